//! What a graph needs to know of a model: hyper-parameters by key, tensors by name, and which layers are alike.

use crate::gguf::{self, GgmlType, Header, Metadata};
use crate::model::weights::repacks;

use super::names::{Places, name_hash, places, whole_hash};

/// Larger hyper-parameters are read as this, so that products of a few stay far from overflow.
const LARGEST: f64 = 16_777_216.0;

/// The same for a tensor's dimensions.
const LARGEST_DIMENSION: i64 = 1 << 31;

/// Longer lists are no hyper-parameters (`LLAMA_MAX_LAYERS`).
const MOST_NUMBERS: u64 = 512;

/// llama.cpp refuses models with more layers (`LLAMA_MAX_LAYERS`).
const MOST_LAYERS: usize = 512;

/// A weight's type and shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Weight {
    /// Its element type.
    pub(super) element: GgmlType,
    /// Elements per dimension, ones where there are fewer than four.
    pub(super) ne: [i64; 4],
    /// The host keeps it in a layout of its own.
    pub(super) repacked: bool,
}

/// A metadata value, as far as graphs need it.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    /// A number, or a truth value as 0 or 1.
    Number(f64),
    /// Numbers, one per layer as a rule.
    Numbers(Vec<f64>),
    /// A text.
    Text(String),
}

impl Value {
    fn read(metadata: &Metadata, key: &str, value: &gguf::Value) -> Option<Self> {
        if let Some(number) = metadata.i64(key) {
            return Some(Self::Number(capped(number as f64)));
        }
        if let Some(number) = metadata.f32(key) {
            return Some(Self::Number(capped(f64::from(number))));
        }
        if let Some(flag) = metadata.bool(key) {
            return Some(Self::Number(f64::from(u8::from(flag))));
        }
        if let Some(text) = metadata.str(key) {
            return Some(Self::Text(text.to_owned()));
        }
        value.as_array().filter(|array| array.len <= MOST_NUMBERS)?;
        let integers = metadata
            .array_i32(key)
            .map(|list| list.into_iter().map(f64::from).collect());
        let unsigned = || {
            metadata
                .array_u32(key)
                .map(|list| list.into_iter().map(f64::from).collect())
        };
        let floats = || {
            metadata
                .array_f32(key)
                .map(|list| list.into_iter().map(f64::from).collect())
        };
        let flags = || {
            metadata.array_bool(key).map(|list| {
                list.into_iter()
                    .map(|flag| f64::from(u8::from(flag)))
                    .collect()
            })
        };
        let numbers: Vec<f64> = integers.or_else(unsigned).or_else(floats).or_else(flags)?;
        Some(Self::Numbers(numbers.into_iter().map(capped).collect()))
    }
}

fn capped(number: f64) -> f64 {
    if number.is_nan() {
        0.0
    } else {
        number.clamp(-LARGEST, LARGEST)
    }
}

pub(super) type Named<T> = Vec<(u64, T)>;

/// The tensors of one kind of layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Layer {
    pub(super) weights: Named<Weight>,
    places: Places,
}

impl Layer {
    /// The place of a tensor among `weights`.
    pub(super) fn place(&self, hash: u64) -> Option<usize> {
        self.places.get(&hash).copied()
    }
}

/// A model, ready for any number of graphs.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GraphModel {
    architecture: String,
    values: Named<Value>,
    kinds: Vec<Layer>,
    kind_of: Vec<usize>,
    shared: Named<Weight>,
    has_scales: bool,
}

pub(super) fn find<T>(list: &Named<T>, hash: u64) -> Option<&T> {
    list.iter()
        .find(|(name, _)| *name == hash)
        .map(|(_, item)| item)
}

impl GraphModel {
    /// Gathers what graphs need from a header of `layers` layers.
    pub(crate) fn from_header(header: &Header, layers: u32) -> Self {
        let architecture = header.architecture().unwrap_or_default();
        let mut model = Self {
            architecture: architecture.to_owned(),
            ..Self::default()
        };
        for (key, value) in header.metadata.iter() {
            let own = key
                .strip_prefix(architecture)
                .and_then(|rest| rest.strip_prefix('.'));
            if let (Some(key), Some(value)) = (own, Value::read(&header.metadata, key, value)) {
                model.values.push((whole_hash(key), value));
            }
        }
        let mut kinds = vec![Layer::default(); (layers as usize).min(MOST_LAYERS)];
        for tensor in &header.tensors {
            model.has_scales |= tensor.name.ends_with(".scale");
            let ne = tensor.dims.map(|n| {
                i64::try_from(n)
                    .unwrap_or(LARGEST_DIMENSION)
                    .min(LARGEST_DIMENSION)
            });
            let weight = Weight {
                element: tensor.ggml_type,
                ne,
                repacked: repacks(tensor),
            };
            match layer_of(&tensor.name) {
                Some((il, name)) => {
                    if let Some(layer) = kinds.get_mut(il) {
                        layer.weights.push((name, weight));
                    }
                }
                None => model.shared.push((whole_hash(&tensor.name), weight)),
            }
        }
        if architecture == "nanbeige" {
            // a looped model runs its layers several times
            let own = kinds
                .iter()
                .take_while(|layer| !layer.weights.is_empty())
                .count();
            for il in own.max(1)..kinds.len() {
                let again = kinds.get(il - own.max(1)).cloned().unwrap_or_default();
                if let Some(layer) = kinds.get_mut(il) {
                    *layer = again;
                }
            }
        }
        for mut layer in kinds {
            layer.weights.sort_by_key(|(name, _)| *name);
            layer.places = places(layer.weights.iter().map(|(name, _)| *name));
            let kind = model
                .kinds
                .iter()
                .position(|known| *known == layer)
                .unwrap_or_else(|| {
                    model.kinds.push(layer);
                    model.kinds.len() - 1
                });
            model.kind_of.push(kind);
        }
        model
    }

    /// The model with the layers `order` of this one.
    #[cfg(test)]
    pub(super) fn with_layers(mut self, order: &[usize]) -> Self {
        let have = self.kind_of.len();
        self.kind_of = order.iter().map(|il| self.kind(*il)).collect();
        for (_, value) in &mut self.values {
            if let Value::Numbers(list) = value
                && list.len() == have
            {
                *list = order
                    .iter()
                    .filter_map(|il| list.get(*il).copied())
                    .collect();
            }
        }
        self
    }

    /// `general.architecture`.
    pub(super) fn architecture(&self) -> &str {
        &self.architecture
    }

    /// A whole number by its key, `default` when absent; of an array the first entry.
    pub(super) fn number(&self, key: &str, default: i64) -> i64 {
        self.float(key).map_or(default, |n| n as i64)
    }

    pub(super) fn flag(&self, key: &str) -> bool {
        self.number(key, 0) != 0
    }

    pub(super) fn float(&self, key: &str) -> Option<f64> {
        match find(&self.values, whole_hash(key))? {
            Value::Number(number) => Some(*number),
            Value::Numbers(numbers) => numbers.first().copied(),
            Value::Text(_) => None,
        }
    }

    /// A layer's own number, or the one for all.
    pub(super) fn at_layer(&self, key: &str, il: usize) -> Option<f64> {
        match find(&self.values, whole_hash(key))? {
            Value::Number(number) => Some(*number),
            Value::Numbers(numbers) => numbers.get(il).copied(),
            Value::Text(_) => None,
        }
    }

    /// The array under `key`, if it is one.
    pub(super) fn array(&self, key: &str) -> Option<&[f64]> {
        match find(&self.values, whole_hash(key))? {
            Value::Numbers(numbers) => Some(numbers),
            _ => None,
        }
    }

    pub(super) fn kind(&self, il: usize) -> usize {
        self.kind_of.get(il).copied().unwrap_or(usize::MAX)
    }

    pub(super) fn layer(&self, il: usize) -> Option<&Layer> {
        self.kinds.get(self.kind(il))
    }

    /// A layer's tensor by its name after `blk.N.`.
    pub(super) fn weight(&self, il: usize, name: &str) -> Option<Weight> {
        find(&self.layer(il)?.weights, name_hash(name)).copied()
    }

    /// A tensor that belongs to no layer.
    pub(super) fn shared(&self, name: &str) -> Option<Weight> {
        find(&self.shared, whole_hash(name)).copied()
    }

    /// Whether any projection has a scale of its own.
    pub(super) fn has_scales(&self) -> bool {
        self.has_scales
    }
}

/// The layer of a tensor and the hash of its name in it: `blk.7.NAME` and `dec.blk.7.NAME` are NAME, `enc.blk.7.NAME` is enc.NAME.
fn layer_of(name: &str) -> Option<(usize, u64)> {
    let (prefix, name) = match name.strip_prefix("enc.") {
        Some(name) => ("enc.", name),
        None => ("", name.strip_prefix("dec.").unwrap_or(name)),
    };
    let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let il = number.parse().ok().filter(|il| *il < MOST_LAYERS)?;
    let hash = match prefix {
        "" => name_hash(rest),
        _ => name_hash(&format!("{prefix}{rest}")),
    };
    Some((il, hash))
}
