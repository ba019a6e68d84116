//! `explain` with its answer (`Explanation`, `Alternative`).

use llama_gpu_core::placement::{
    Alternative, Explanation, Policy, Running, explain as explain_placement,
};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::estimate::estimate_error;
use crate::gpu::repr_from_fields;
use crate::placement::{PyPlacedDevice, PyPlacement, PyPolicy, does_not_fit};
use crate::question::Question;

#[pyclass(frozen, eq, name = "Alternative", module = "llama_gpu")]
#[derive(PartialEq)]
pub(crate) struct PyAlternative(Alternative);

#[pymethods]
impl PyAlternative {
    #[getter]
    fn step(&self) -> &'static str {
        self.0.step.name()
    }

    #[getter]
    fn outcome(&self) -> &'static str {
        self.0.outcome.name()
    }

    #[getter]
    fn devices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.devices.iter().cloned().map(PyPlacedDevice))
    }

    #[getter]
    fn free_bytes_by_gpu<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let free = PyDict::new(py);
        for (device, bytes) in self.0.devices.iter().zip(&self.0.free_bytes) {
            free.set_item(&device.uuid, bytes)?;
        }
        Ok(free)
    }

    #[getter]
    fn short_bytes(&self) -> u64 {
        self.0.short_bytes()
    }

    #[getter]
    fn evict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.0.evict)
    }

    #[getter]
    fn eviction_cost(&self) -> u64 {
        self.0.eviction_cost
    }

    #[getter]
    fn reason(&self) -> &str {
        &self.0.reason
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let fields = PyDict::new(py);
        fields.set_item("step", self.step())?;
        fields.set_item("outcome", self.outcome())?;
        fields.set_item("devices", self.devices(py)?)?;
        fields.set_item("evict", self.evict(py)?)?;
        fields.set_item("reason", self.reason())?;
        Ok(format!("<{}>", repr_from_fields("Alternative", &fields)?))
    }
}

#[pyclass(frozen, eq, name = "Explanation", module = "llama_gpu")]
#[derive(PartialEq)]
pub(crate) struct PyExplanation(Explanation);

#[pymethods]
impl PyExplanation {
    #[getter]
    fn placement(&self) -> Option<PyPlacement> {
        self.0.answer.as_ref().ok().cloned().map(PyPlacement)
    }

    #[getter]
    fn refusal<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        let refusal = self.0.answer.as_ref().err()?;
        Some(
            does_not_fit(py, refusal)
                .into_value(py)
                .into_bound(py)
                .into_any(),
        )
    }

    #[getter]
    fn alternatives<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.alternatives.iter().cloned().map(PyAlternative))
    }

    #[getter]
    fn staying<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let staying = PyDict::new(py);
        for (id, why) in &self.0.staying {
            staying.set_item(id, why)?;
        }
        Ok(staying)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let fields = PyDict::new(py);
        fields.set_item("placement", self.placement())?;
        fields.set_item("refusal", self.refusal(py))?;
        fields.set_item("alternatives", self.alternatives(py)?)?;
        fields.set_item("staying", self.staying(py)?)?;
        Ok(format!("<{}>", repr_from_fields("Explanation", &fields)?))
    }
}

#[pyfunction]
#[pyo3(
    signature = (model, gpus, *, policy=None, running=None, **options),
    text_signature = "(model, gpus, *, policy=None, running=(), **options)"
)]
pub(crate) fn explain(
    model: &Bound<'_, PyAny>,
    gpus: &Bound<'_, PyAny>,
    policy: Option<&Bound<'_, PyPolicy>>,
    running: Option<&Bound<'_, PyAny>>,
    options: Option<&Bound<'_, PyDict>>,
) -> PyResult<PyExplanation> {
    let py = model.py();
    let question = Question::read("explain", model, gpus, running, options)?;
    let default = Policy::default();
    let running = question.running.iter();
    let running: Vec<&Running> = running.map(|model| &model.get().0).collect();
    explain_placement(
        &question.facts,
        &question.parsed.options,
        question.parsed.companions(),
        &question.gpus.as_refs(),
        policy.map_or(&default, |policy| &policy.get().0),
        &running,
    )
    .map(PyExplanation)
    .map_err(|error| estimate_error(py, &question.header, &error))
}
