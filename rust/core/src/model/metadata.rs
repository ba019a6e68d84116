//! Reading `<architecture>.<key>` with the types that llama.cpp accepts.

use crate::estimate::EstimateError;
use crate::gguf::{Header, Metadata};

/// The keys of one model, under its architecture's prefix.
pub(super) struct Keys<'a> {
    header: &'a Header,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    /// # Errors
    /// [`EstimateError::Unsupported`] where the header names no architecture, or one that
    /// is no language model (a projector, a `LoRA` adapter).
    pub(super) fn new(header: &'a Header) -> Result<Self, EstimateError> {
        let unsupported = |architecture: Option<&str>, reason: &str| EstimateError::Unsupported {
            architecture: architecture.map(str::to_owned),
            reason: reason.to_owned(),
        };
        let architecture = header
            .architecture()
            .ok_or_else(|| unsupported(None, "the header names no architecture"))?;
        if architecture == "clip" {
            return Err(unsupported(
                Some(architecture),
                "it is a projector, not a language model",
            ));
        }
        if header.metadata.str("general.type") == Some("adapter") {
            return Err(unsupported(
                Some(architecture),
                "it is a LoRA adapter, not a language model",
            ));
        }
        let keys = Self {
            header,
            architecture,
        };
        if keys.u32("block_count")?.is_none() {
            return Err(unsupported(
                Some(architecture),
                "the header has no block_count, it is not a language model",
            ));
        }
        Ok(keys)
    }

    pub(super) fn architecture(&self) -> &'a str {
        self.architecture
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.metadata().get(&self.full(key)).is_some()
    }

    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.header.tensor(name).is_some()
    }

    pub(super) fn invalid(&self, key: &str, reason: &str) -> EstimateError {
        EstimateError::Header {
            key: self.full(key),
            reason: reason.to_owned(),
        }
    }

    /// A whole number; `None` where the key is missing or is a list.
    pub(super) fn u32(&self, key: &str) -> Result<Option<u32>, EstimateError> {
        let full = self.full(key);
        match self.metadata().get(&full) {
            None => Ok(None),
            Some(_) if self.metadata().array(&full).is_some() => Ok(None),
            Some(_) => match self.metadata().u32(&full) {
                Some(value) => Ok(Some(value)),
                None => Err(self.invalid(key, "must be a whole number of 32 bits")),
            },
        }
    }

    pub(super) fn required_u32(&self, key: &str) -> Result<u32, EstimateError> {
        self.u32(key)?
            .ok_or_else(|| self.invalid(key, "is missing"))
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, EstimateError> {
        let full = self.full(key);
        match self.metadata().get(&full) {
            None => Ok(None),
            Some(_) => match self.metadata().bool(&full) {
                Some(value) => Ok(Some(value)),
                None => Err(self.invalid(key, "must be a bool")),
            },
        }
    }

    /// A number per layer, from a list or one number for all (`get_key_or_arr`).
    pub(super) fn per_layer(
        &self,
        key: &str,
        layers: u32,
    ) -> Result<Option<Vec<u32>>, EstimateError> {
        match self.numbers(key)? {
            Some(list) if list.len() == layers as usize => Ok(Some(list)),
            Some(_) => Err(self.invalid(key, "must have as many entries as there are layers")),
            None => Ok(self.u32(key)?.map(|value| vec![value; layers as usize])),
        }
    }

    /// A list of numbers; `None` where the key is missing or no list.
    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<u32>>, EstimateError> {
        let full = self.full(key);
        if self.metadata().array(&full).is_none() {
            return Ok(None);
        }
        // signed lists mark "none" with -1, which no caller counts
        let list = self.metadata().array_u32(&full).or_else(|| {
            let signed = self.metadata().array_i32(&full)?;
            Some(
                signed
                    .into_iter()
                    .map(|n| u32::try_from(n).unwrap_or(0))
                    .collect(),
            )
        });
        match list {
            Some(list) if list.len() <= 512 => Ok(Some(list)),
            _ => Err(self.invalid(key, "must be a list of at most 512 whole numbers")),
        }
    }

    /// Refuses a number, or a list with one, of more than `most`.
    pub(super) fn at_most(&self, key: &str, most: u32) -> Result<(), EstimateError> {
        let numbers = self.numbers(key)?.into_iter().flatten();
        if numbers.chain(self.u32(key)?).any(|number| number > most) {
            return Err(self.invalid(key, &format!("must be at most {most}")));
        }
        Ok(())
    }

    /// A list of yes and no, as bools or numbers; `None` where the key is missing or no list.
    pub(super) fn flags(&self, key: &str) -> Result<Option<Vec<bool>>, EstimateError> {
        let full = self.full(key);
        if let Some(list) = self.metadata().array_bool(&full) {
            if list.len() > 512 {
                return Err(self.invalid(key, "must be a list of at most 512 entries"));
            }
            return Ok(Some(list));
        }
        let numbers = self.numbers(key)?;
        Ok(numbers.map(|list| list.into_iter().map(|n| n != 0).collect()))
    }

    /// The same, where one value stands for all layers.
    pub(super) fn flags_or_one(
        &self,
        key: &str,
        layers: u32,
    ) -> Result<Option<Vec<bool>>, EstimateError> {
        if let Some(list) = self.flags(key)? {
            return Ok(Some(list));
        }
        let full = self.full(key);
        let one = match self.metadata().bool(&full) {
            Some(flag) => Some(flag),
            None => self.u32(key)?.map(|n| n != 0),
        };
        Ok(one.map(|flag| vec![flag; layers as usize]))
    }

    /// `llama_vocab::n_tokens`: the token list, else the number.
    pub(super) fn vocabulary_size(&self) -> Result<u32, EstimateError> {
        let listed = self
            .metadata()
            .array("tokenizer.ggml.tokens")
            .and_then(|tokens| u32::try_from(tokens.len).ok());
        match listed {
            Some(count) => Ok(count),
            None => Ok(self.u32("vocab_size")?.unwrap_or(0)),
        }
    }

    fn metadata(&self) -> &'a Metadata {
        &self.header.metadata
    }

    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }
}
