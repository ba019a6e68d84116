//! What `place`, `explain` and `plan` are asked: a model, its options, GPUs and running models, as Python hands them in.

use std::sync::Arc;

use llama_gpu_core::gguf::Header;
use llama_gpu_core::gpu::Gpu;
use llama_gpu_core::model::ModelFacts;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::estimate::{ParsedOptions, facts_of};
use crate::gguf::header_from_any;
use crate::gpu::{PyGpu, PyGpuSnapshot};
use crate::placement::PyRunning;

/// What `place` and `explain` are asked.
pub(crate) struct Question<'py> {
    pub(crate) header: Arc<Header>,
    pub(crate) facts: Arc<ModelFacts>,
    pub(crate) parsed: ParsedOptions,
    pub(crate) gpus: Gpus<'py>,
    pub(crate) running: Vec<Bound<'py, PyRunning>>,
}

impl<'py> Question<'py> {
    pub(crate) fn read(
        function: &str,
        model: &Bound<'py, PyAny>,
        gpus: &Bound<'py, PyAny>,
        running: Option<&Bound<'py, PyAny>>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Self> {
        let header = header_from_any(model)?;
        let parsed = estimate_options(function, options)?;
        let facts = facts_of(model.py(), &header)?;
        let running = match running {
            None => Vec::new(),
            Some(running) => elements(running, "running must be a sequence of Running")?,
        };
        let gpus = Gpus::from_any(gpus)?;
        Ok(Self {
            header,
            facts,
            parsed,
            gpus,
            running,
        })
    }
}

/// What `estimate` takes by keyword, without what `place` is asked to find out.
pub(crate) fn estimate_options(
    function: &str,
    keywords: Option<&Bound<'_, PyDict>>,
) -> PyResult<ParsedOptions> {
    let mut parsed = ParsedOptions::default();
    for (key, value) in keywords.into_iter().flatten() {
        let key: String = key.extract()?;
        let is_the_answer = key == "devices" || key == "tensor_split";
        if is_the_answer || !parsed.set(&key, &value)? {
            let message = format!("{function}() got an unexpected keyword argument '{key}'");
            return Err(PyTypeError::new_err(message));
        }
    }
    Ok(parsed)
}

/// GPUs that stay where Python keeps them: thousands are not worth copying.
pub(crate) enum Gpus<'py> {
    Snapshot(Bound<'py, PyGpuSnapshot>),
    Sequence(Vec<Bound<'py, PyGpu>>),
}

impl<'py> Gpus<'py> {
    /// # Errors
    /// `TypeError` for what is neither a `GpuSnapshot` nor a sequence of `Gpu`.
    pub(crate) fn from_any(gpus: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(snapshot) = gpus.cast::<PyGpuSnapshot>() {
            return Ok(Self::Snapshot(snapshot.clone()));
        }
        elements(gpus, "gpus must be a GpuSnapshot or a sequence of Gpu").map(Self::Sequence)
    }

    pub(crate) fn as_refs(&self) -> Vec<&Gpu> {
        match self {
            Self::Snapshot(snapshot) => snapshot.get().0.gpus.iter().collect(),
            Self::Sequence(gpus) => gpus.iter().map(|gpu| &gpu.get().0).collect(),
        }
    }
}

/// Every element of a sequence as the class it must have.
pub(crate) fn elements<'py, Class: pyo3::PyClass>(
    sequence: &Bound<'py, PyAny>,
    wanted: &str,
) -> PyResult<Vec<Bound<'py, Class>>> {
    let mut found = Vec::with_capacity(sequence.len().unwrap_or(0));
    for element in sequence.try_iter()? {
        let element = element?;
        let Ok(element) = element.cast::<Class>() else {
            let given = element.get_type().name()?;
            return Err(PyTypeError::new_err(format!("{wanted}, not of {given}")));
        };
        found.push(element.clone());
    }
    Ok(found)
}
