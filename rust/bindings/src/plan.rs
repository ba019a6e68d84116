//! `plan` with its question (`Wanted`) and its answer (`Plan`).

use std::collections::HashSet;
use std::sync::Arc;

use llama_gpu_core::gguf::Header;
use llama_gpu_core::model::ModelFacts;
use llama_gpu_core::placement::{GpuName, Plan, PlanError, Policy, Wanted, plan as plan_models};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::estimate::{ParsedOptions, estimate_error, facts_of};
use crate::gguf::header_from_any;
use crate::gpu::repr_from_fields;
use crate::placement::{NewArguments, PyPlacement, PyPolicy, does_not_fit, gpu_names};
use crate::question::{Gpus, elements, estimate_options};

#[pyclass(frozen, name = "Wanted", module = "llama_gpu")]
pub(crate) struct PyWanted {
    id: String,
    header: Arc<Header>,
    facts: Arc<ModelFacts>,
    parsed: ParsedOptions,
    value: f64,
    priority: i32,
    pinned: bool,
    allowed: Option<Vec<GpuName>>,
    max_gpus: Option<u32>,
    /// What it was made of, to make another.
    fields: Py<PyDict>,
}

#[pymethods]
impl PyWanted {
    #[expect(clippy::too_many_arguments, reason = "keywords of a Python class")]
    #[new]
    #[pyo3(signature = (model, *, id=None, value=1.0, priority=0, pinned=false, allowed=None, max_gpus=None,
        **options))]
    fn new(
        model: &Bound<'_, PyAny>,
        id: Option<String>,
        value: f64,
        priority: i32,
        pinned: bool,
        allowed: Option<&Bound<'_, PyAny>>,
        max_gpus: Option<u32>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let py = model.py();
        if !value.is_finite() || value < 0.0 {
            return Err(PyValueError::new_err("value must be 0 or more, and finite"));
        }
        let header = header_from_any(model)?;
        let facts = facts_of(py, &header)?;
        let stem = || {
            header
                .path
                .file_stem()
                .map(|stem| stem.to_string_lossy().into_owned())
        };
        let id = id.or_else(stem).unwrap_or_default();
        let fields = options.map_or_else(|| Ok(PyDict::new(py)), PyDictMethods::copy)?;
        fields.set_item("model", model)?;
        fields.set_item("id", &id)?;
        fields.set_item("value", value)?;
        fields.set_item("priority", priority)?;
        fields.set_item("pinned", pinned)?;
        fields.set_item("allowed", allowed)?;
        fields.set_item("max_gpus", max_gpus)?;
        Ok(Self {
            id,
            facts,
            parsed: estimate_options("Wanted", options)?,
            value,
            priority,
            pinned,
            allowed: allowed.map(gpu_names).transpose()?,
            max_gpus,
            fields: fields.unbind(),
            header,
        })
    }

    #[getter]
    fn id(&self) -> &str {
        &self.id
    }

    #[getter]
    fn value(&self) -> f64 {
        self.value
    }

    #[getter]
    fn priority(&self) -> i32 {
        self.priority
    }

    #[getter]
    fn pinned(&self) -> bool {
        self.pinned
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<NewArguments<'py>> {
        Ok((PyTuple::empty(py), self.fields.bind(py).copy()?))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        repr_from_fields("Wanted", self.fields.bind(py))
    }
}

impl PyWanted {
    fn as_wanted(&self) -> Wanted<'_> {
        Wanted {
            id: &self.id,
            facts: &self.facts,
            companions: self.parsed.companions(),
            options: &self.parsed.options,
            value: self.value,
            priority: self.priority,
            pinned: self.pinned,
            allowed: self.allowed.clone(),
            max_gpus: self.max_gpus,
        }
    }
}

#[pyclass(frozen, eq, name = "Plan", module = "llama_gpu")]
#[derive(PartialEq)]
pub(crate) struct PyPlan {
    ids: Vec<String>,
    plan: Plan,
}

#[pymethods]
impl PyPlan {
    #[getter]
    fn placements<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let placements = PyDict::new(py);
        for (id, placement) in self.ids.iter().zip(&self.plan.placements) {
            if let Some(placement) = placement {
                placements.set_item(id, PyPlacement(placement.clone()))?;
            }
        }
        Ok(placements)
    }

    #[getter]
    fn left_out<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let left_out = PyDict::new(py);
        for (place, reason) in &self.plan.left_out {
            left_out.set_item(self.ids.get(*place), reason)?;
        }
        Ok(left_out)
    }

    #[getter]
    fn free_bytes_by_gpu<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let free = PyDict::new(py);
        for (uuid, bytes) in &self.plan.free_bytes_by_gpu {
            free.set_item(uuid, bytes)?;
        }
        Ok(free)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let fields = PyDict::new(py);
        fields.set_item("placements", self.placements(py)?)?;
        fields.set_item("left_out", self.left_out(py)?)?;
        fields.set_item("free_bytes_by_gpu", self.free_bytes_by_gpu(py)?)?;
        Ok(format!("<{}>", repr_from_fields("Plan", &fields)?))
    }
}

#[pyfunction]
#[pyo3(signature = (models, gpus, *, policy=None))]
pub(crate) fn plan(
    models: &Bound<'_, PyAny>,
    gpus: &Bound<'_, PyAny>,
    policy: Option<&Bound<'_, PyPolicy>>,
) -> PyResult<PyPlan> {
    let py = models.py();
    let wanted = elements::<PyWanted>(models, "models must be a sequence of Wanted")?;
    let mut seen = HashSet::new();
    for model in &wanted {
        let id = model.get().id.as_str();
        if !seen.insert(id) {
            return Err(PyValueError::new_err(format!(
                "two models have the id \"{id}\""
            )));
        }
    }
    let gpus = Gpus::from_any(gpus)?;
    let default = Policy::default();
    let policy = policy.map_or(&default, |policy| &policy.get().0);
    let question: Vec<Wanted<'_>> = wanted.iter().map(|model| model.get().as_wanted()).collect();
    let plan = plan_models(&question, &gpus.as_refs(), policy).map_err(|error| match error {
        PlanError::Pinned(refusal) => does_not_fit(py, &refusal),
        PlanError::Estimate(place, error) => match wanted.get(place) {
            Some(model) => estimate_error(py, &model.get().header, &error),
            None => PyValueError::new_err(error.to_string()),
        },
    })?;
    let ids = wanted.iter().map(|model| model.get().id.clone()).collect();
    Ok(PyPlan { ids, plan })
}
