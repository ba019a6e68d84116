//! Facts about a model, derived once from its header.
//!
//! Everything that depends on the header alone is worked out here, so that an
//! estimate is a few sums over layers. What llama.cpp's `load_arch_hparams`,
//! `load_arch_tensors` and `create_memory` decide per architecture is in
//! [`architecture`] (names and rules), [`cache`] (what each layer remembers)
//! and [`weights`] (where each tensor goes).

mod architecture;
mod cache;
mod hyperparameters;
mod metadata;
pub(crate) mod weights;

pub use architecture::{SlidingKind, is_known_architecture};
pub use cache::{CacheElement, CacheRows, CacheTensor};
pub use hyperparameters::Hyperparameters;
pub use weights::{Footprint, LayerWeights, SharedTensor, WeightFacts};

use crate::estimate::EstimateError;
use crate::estimate::graph::{GraphModel, Planned};
use crate::gguf::Header;

/// What an estimate needs to know of a model; made once per header.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFacts {
    /// The numbers of the header as llama.cpp reads them, per layer where they vary.
    pub hyperparameters: Hyperparameters,
    /// What each layer keeps between tokens, in layer order.
    pub cache: Vec<Vec<CacheTensor>>,
    /// Bytes of the tensors, grouped by where they go.
    pub weights: WeightFacts,
    /// What compute graphs are built from.
    pub(crate) graph: GraphModel,
    /// What was planned with that.
    pub(crate) planned: Planned,
}

impl ModelFacts {
    /// Derives the facts from a header.
    ///
    /// # Errors
    /// [`EstimateError::Unsupported`] where the header describes no language model,
    /// [`EstimateError::Header`] where a key is missing or out of range.
    pub fn from_header(header: &Header) -> Result<Self, EstimateError> {
        let hyperparameters = Hyperparameters::from_header(header)?;
        let cache = cache::plan(&hyperparameters);
        let weights = WeightFacts::from_header(header, &hyperparameters)?;
        let graph = GraphModel::from_header(header, hyperparameters.layer_count());
        Ok(Self {
            hyperparameters,
            cache,
            weights,
            graph,
            planned: Planned::default(),
        })
    }

    /// The architecture's name in the header (`general.architecture`).
    pub fn architecture(&self) -> &str {
        &self.hyperparameters.architecture
    }

    /// Layers that can be placed, without the output layer (llama.cpp's `n_layer_all`).
    pub fn layer_count(&self) -> u32 {
        self.hyperparameters.layer_count()
    }

    /// The context length the model was trained with, in tokens.
    pub fn trained_context_length(&self) -> u32 {
        self.hyperparameters.trained_context_length
    }
}
