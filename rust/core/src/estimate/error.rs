//! Why there is no estimate.

use std::fmt;

/// Why a model or an option set has no estimate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EstimateError {
    /// The file is valid, but holds no language model.
    Unsupported {
        /// `general.architecture`, where there is one.
        architecture: Option<String>,
        /// In words.
        reason: String,
    },
    /// A key or tensor of the header is missing or out of range.
    Header {
        /// The key or the tensor's name.
        key: String,
        /// In words.
        reason: String,
    },
    /// An option is out of range, or llama.cpp refuses it for this model.
    Option {
        /// The option, as it is called in [`EstimateOptions`](super::EstimateOptions).
        name: &'static str,
        /// In words.
        reason: String,
    },
}

impl EstimateError {
    pub(crate) fn option(name: &'static str, reason: impl Into<String>) -> Self {
        Self::Option {
            name,
            reason: reason.into(),
        }
    }
}

impl fmt::Display for EstimateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported {
                architecture: Some(architecture),
                reason,
            } => write!(f, "no estimate for architecture '{architecture}': {reason}"),
            Self::Unsupported { reason, .. } => write!(f, "no estimate: {reason}"),
            Self::Header { key, reason } => write!(f, "{key} {reason}"),
            Self::Option { name, reason } => write!(f, "{name} {reason}"),
        }
    }
}

impl std::error::Error for EstimateError {}
