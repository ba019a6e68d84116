//! Writes GGUF files, right and wrong ones, byte by byte.

pub(crate) const U8: u32 = 0;
pub(crate) const U32: u32 = 4;
pub(crate) const I32: u32 = 5;
pub(crate) const F32: u32 = 6;
pub(crate) const BOOL: u32 = 7;
pub(crate) const STRING: u32 = 8;
pub(crate) const ARRAY: u32 = 9;
pub(crate) const U64: u32 = 10;

/// A file in the making. Counts follow what is added unless they are set.
#[derive(Clone)]
pub(crate) struct GgufBytes {
    pub(crate) big_endian: bool,
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) metadata_count: Option<u64>,
    pub(crate) data_bytes: usize,
    pub(crate) alignment: usize,
    pub(crate) metadata: Vec<Vec<u8>>,
    pub(crate) tensors: Vec<Vec<u8>>,
}

impl Default for GgufBytes {
    fn default() -> Self {
        Self {
            big_endian: false,
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            metadata_count: None,
            data_bytes: 0,
            alignment: 32,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

impl GgufBytes {
    pub(crate) fn number32(&self, value: u32) -> Vec<u8> {
        if self.big_endian {
            value.to_be_bytes().into()
        } else {
            value.to_le_bytes().into()
        }
    }

    pub(crate) fn number64(&self, value: u64) -> Vec<u8> {
        if self.big_endian {
            value.to_be_bytes().into()
        } else {
            value.to_le_bytes().into()
        }
    }

    pub(crate) fn string_bytes(&self, text: impl AsRef<[u8]>) -> Vec<u8> {
        let text = text.as_ref();
        [self.number64(text.len() as u64), text.to_vec()].concat()
    }

    /// Adds an entry: key, value type, and the value's bytes as they are.
    pub(crate) fn raw(mut self, key: impl AsRef<[u8]>, kind: u32, value: &[u8]) -> Self {
        let entry = [self.string_bytes(key), self.number32(kind), value.to_vec()].concat();
        self.metadata.push(entry);
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        let bytes = self.number32(value);
        self.raw(key, U32, &bytes)
    }

    pub(crate) fn string(self, key: &str, value: impl AsRef<[u8]>) -> Self {
        let bytes = self.string_bytes(value);
        self.raw(key, STRING, &bytes)
    }

    /// Adds an array: element type, length and the elements' bytes as they are.
    pub(crate) fn array(self, key: &str, element: u32, len: u64, items: &[u8]) -> Self {
        let value = [self.number32(element), self.number64(len), items.to_vec()].concat();
        self.raw(key, ARRAY, &value)
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let items: Vec<u8> = values
            .iter()
            .flat_map(|value| self.string_bytes(value))
            .collect();
        self.array(key, STRING, values.len() as u64, &items)
    }

    pub(crate) fn tensor(
        mut self,
        name: impl AsRef<[u8]>,
        dims: &[u64],
        kind: u32,
        offset: u64,
    ) -> Self {
        let mut entry = self.string_bytes(name);
        entry.extend(self.number32(u32::try_from(dims.len()).unwrap()));
        entry.extend(dims.iter().flat_map(|dim| self.number64(*dim)));
        entry.extend(self.number32(kind));
        entry.extend(self.number64(offset));
        self.tensors.push(entry);
        self
    }

    pub(crate) fn data(mut self, bytes: usize) -> Self {
        self.data_bytes = bytes;
        self
    }

    pub(crate) fn header(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.number32(self.version));
        bytes.extend(self.number64(self.tensor_count.unwrap_or(self.tensors.len() as u64)));
        bytes.extend(self.number64(self.metadata_count.unwrap_or(self.metadata.len() as u64)));
        bytes.extend(self.metadata.concat());
        bytes.extend(self.tensors.concat());
        bytes
    }

    pub(crate) fn file(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(
            bytes.len().next_multiple_of(self.alignment) + self.data_bytes,
            0,
        );
        bytes
    }
}

/// A small file with a value of every kind and two tensors.
pub(crate) fn sample(version: u32, big_endian: bool) -> GgufBytes {
    let blank = GgufBytes {
        big_endian,
        version,
        ..GgufBytes::default()
    };
    let heads: Vec<u8> = [8_u32, 4, 8]
        .iter()
        .flat_map(|heads| blank.number32(*heads))
        .collect();
    let inner = [
        [blank.number32(BOOL), blank.number64(2), vec![1, 0]].concat(),
        [
            blank.number32(STRING),
            blank.number64(1),
            blank.string_bytes("deep"),
        ]
        .concat(),
    ]
    .concat();
    let seven = if big_endian {
        7_u16.to_be_bytes()
    } else {
        7_u16.to_le_bytes()
    };
    let theta = blank.number32(1.5_f32.to_bits());
    let negative = blank.number64(u64::MAX - 2);
    let double = blank.number64(0.25_f64.to_bits());
    let wide = blank.number64(1 << 40);
    blank
        .string("general.architecture", "llama")
        .u32("llama.context_length", 4096)
        .raw("a.u8", U8, &[200])
        .raw("a.i8", 1, &[0xFE])
        .raw("a.u16", 2, &seven)
        .raw("a.i16", 3, &seven)
        .raw("a.f32", F32, &theta)
        .raw("a.true", BOOL, &[1])
        .raw("a.odd_bool", BOOL, &[7])
        .raw("a.u64", U64, &wide)
        .raw("a.i64", 11, &negative)
        .raw("a.f64", 12, &double)
        .string("a.latin1", b"caf\xE9")
        .array("llama.attention.head_count", I32, 3, &heads)
        .array("a.nested", ARRAY, 2, &inner)
        .strings("tokenizer.ggml.tokens", &["<s>", "", "hello", "wörld"])
        .tensor("token_embd.weight", &[64, 4], 8, 0)
        .tensor("output_norm.weight", &[64], 0, 288)
        .data(288 + 256)
}
