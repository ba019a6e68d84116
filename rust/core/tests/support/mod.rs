//! Made-up GPUs, running models, and a llama header of any size without the weights it speaks of.

#![allow(dead_code, reason = "each test program uses what it needs of this")]

use llama_gpu_core::gguf::{Header, parse};
use llama_gpu_core::gpu::Gpu;
use llama_gpu_core::model::ModelFacts;
use llama_gpu_core::placement::Running;

pub(crate) const GIB: u64 = 1 << 30;

/// `GPU-index`, of which so much is free.
pub(crate) fn gpu(index: u32, total_gib: u64, free_gib: u64) -> Gpu {
    Gpu {
        index,
        uuid: format!("GPU-{index}"),
        total_bytes: Some(total_gib * GIB),
        free_bytes: Some(free_gib * GIB),
        ..Gpu::default()
    }
}

/// A model that runs on `GPU-gpu`.
pub(crate) fn running(id: &str, gpu: u32, gib: u64) -> Running {
    Running {
        id: id.to_owned(),
        bytes_by_gpu: vec![(format!("GPU-{gpu}"), gib * GIB)],
        ..Running::default()
    }
}

/// The shape of a made-up llama.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Llama {
    pub(crate) layers: u32,
    pub(crate) width: u32,
    pub(crate) feed_forward: u32,
    pub(crate) heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) vocabulary: u32,
    pub(crate) context: u32,
    /// 0 for a dense model.
    pub(crate) experts: u32,
}

/// Eighty layers and some 130 GiB in 16 bits.
pub(crate) const LARGE: Llama = Llama {
    layers: 80,
    width: 8192,
    feed_forward: 28672,
    heads: 64,
    kv_heads: 8,
    vocabulary: 128_256,
    context: 8192,
    experts: 0,
};

/// Sixteen layers and some 2.3 GiB in 16 bits.
pub(crate) const SMALL: Llama = Llama {
    layers: 16,
    width: 2048,
    feed_forward: 8192,
    heads: 32,
    kv_heads: 8,
    vocabulary: 128_256,
    context: 8192,
    experts: 0,
};

const F16: u32 = 1;
const F32: u32 = 0;
const UINT32: u32 = 4;
const STRING: u32 = 8;

#[derive(Default)]
struct Writer {
    values: Vec<u8>,
    value_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data_bytes: u64,
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Writer {
    fn text(&mut self, key: &str, value: &str) {
        string(&mut self.values, key);
        self.values.extend(STRING.to_le_bytes());
        string(&mut self.values, value);
        self.value_count += 1;
    }

    fn number(&mut self, key: &str, value: u32) {
        string(&mut self.values, key);
        self.values.extend(UINT32.to_le_bytes());
        self.values.extend(value.to_le_bytes());
        self.value_count += 1;
    }

    fn tensor(&mut self, name: &str, shape: &[u32], kind: u32) {
        string(&mut self.tensors, name);
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        for &side in shape {
            self.tensors.extend(u64::from(side).to_le_bytes());
        }
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(self.data_bytes.to_le_bytes());
        let elements: u64 = shape.iter().map(|&side| u64::from(side)).product();
        self.data_bytes += (elements * if kind == F16 { 2 } else { 4 }).next_multiple_of(32);
        self.tensor_count += 1;
    }

    fn header(self) -> Header {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(self.tensor_count.to_le_bytes());
        bytes.extend(self.value_count.to_le_bytes());
        bytes.extend(self.values);
        bytes.extend(self.tensors);
        let file_bytes = (bytes.len() as u64).next_multiple_of(32) + self.data_bytes;
        let parsed = parse(&bytes, file_bytes).unwrap();
        Header {
            version: parsed.version,
            byte_order: parsed.byte_order,
            alignment: parsed.alignment,
            metadata: parsed.metadata,
            tensors: parsed.tensors,
            shards: Vec::new(),
            file_bytes,
            path: "made-up.gguf".into(),
        }
    }
}

impl Llama {
    pub(crate) fn facts(self) -> ModelFacts {
        ModelFacts::from_header(&self.header()).unwrap()
    }

    pub(crate) fn header(self) -> Header {
        let mut file = Writer::default();
        file.text("general.architecture", "llama");
        file.number("llama.block_count", self.layers);
        file.number("llama.embedding_length", self.width);
        file.number("llama.feed_forward_length", self.feed_forward);
        file.number("llama.attention.head_count", self.heads);
        file.number("llama.attention.head_count_kv", self.kv_heads);
        file.number("llama.context_length", self.context);
        file.number("llama.vocab_size", self.vocabulary);
        if self.experts > 0 {
            file.number("llama.expert_count", self.experts);
            file.number("llama.expert_used_count", 2);
        }
        let kv_width = self.width / self.heads * self.kv_heads;
        file.tensor("token_embd.weight", &[self.width, self.vocabulary], F16);
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            file.tensor(&name("attn_norm"), &[self.width], F32);
            file.tensor(&name("attn_q"), &[self.width, self.width], F16);
            file.tensor(&name("attn_k"), &[self.width, kv_width], F16);
            file.tensor(&name("attn_v"), &[self.width, kv_width], F16);
            file.tensor(&name("attn_output"), &[self.width, self.width], F16);
            file.tensor(&name("ffn_norm"), &[self.width], F32);
            for part in ["ffn_gate", "ffn_up", "ffn_down"] {
                let shape = match part {
                    "ffn_down" => [self.feed_forward, self.width],
                    _ => [self.width, self.feed_forward],
                };
                if self.experts == 0 {
                    file.tensor(&name(part), &shape, F16);
                } else {
                    let part = format!("{part}_exps");
                    file.tensor(&name(&part), &[shape[0], shape[1], self.experts], F16);
                }
            }
            if self.experts > 0 {
                file.tensor(&name("ffn_gate_inp"), &[self.width, self.experts], F32);
            }
        }
        file.tensor("output_norm.weight", &[self.width], F32);
        file.tensor("output.weight", &[self.width, self.vocabulary], F16);
        file.header()
    }
}
