//! `place` with its question (`Policy`, `Running`) and its answer (`Placement`, `PlacedDevice`).

use std::sync::{Arc, Mutex, PoisonError};

use llama_gpu_core::gpu::Gpu;
use llama_gpu_core::model::ModelFacts;
use llama_gpu_core::placement::{
    DoesNotFit, GpuName, Mode, PlaceError, PlacedDevice, Placement, Policy, Remembered, Running,
    UnknownChoice, place_again,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyString, PyTuple};

use crate::errors::raise;
use crate::estimate::{ParsedOptions, PyMemoryEstimate, estimate_error};
use crate::gpu::repr_from_fields;
use crate::question::Question;

pub(crate) type NewArguments<'py> = (Bound<'py, PyTuple>, Bound<'py, PyDict>);

fn unknown_choice(key: &str, error: &UnknownChoice) -> PyErr {
    PyValueError::new_err(format!("{key}: {error}"))
}

#[pyclass(
    frozen,
    eq,
    hash,
    from_py_object,
    name = "Policy",
    module = "llama_gpu"
)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyPolicy(pub(crate) Policy);

#[pymethods]
impl PyPolicy {
    #[expect(clippy::too_many_arguments, reason = "keywords of a Python class")]
    #[new]
    #[pyo3(signature = (*, strategy="single-gpu-preferred", headroom_bytes=0, headroom_by_gpu=None, max_gpus=None,
        allowed=None, cpu="never", partial=false, priority=0))]
    fn new(
        strategy: &str,
        headroom_bytes: u64,
        headroom_by_gpu: Option<&Bound<'_, PyDict>>,
        max_gpus: Option<u32>,
        allowed: Option<&Bound<'_, PyAny>>,
        cpu: &str,
        partial: bool,
        priority: i32,
    ) -> PyResult<Self> {
        Ok(Self(Policy {
            strategy: strategy
                .parse()
                .map_err(|e| unknown_choice("strategy", &e))?,
            headroom_bytes,
            headroom_by_gpu: headroom_by_gpu
                .into_iter()
                .flatten()
                .map(|(name, bytes)| Ok((gpu_name("headroom_by_gpu", &name)?, bytes.extract()?)))
                .collect::<PyResult<_>>()?,
            max_gpus,
            allowed: allowed.map(gpu_names).transpose()?,
            cpu: cpu.parse().map_err(|e| unknown_choice("cpu", &e))?,
            partial,
            priority,
        }))
    }

    #[getter]
    fn strategy(&self) -> &'static str {
        self.0.strategy.name()
    }

    #[getter]
    fn headroom_bytes(&self) -> u64 {
        self.0.headroom_bytes
    }

    #[getter]
    fn headroom_by_gpu<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let headroom = PyDict::new(py);
        for (name, bytes) in &self.0.headroom_by_gpu {
            headroom.set_item(name_object(py, name)?, bytes)?;
        }
        Ok(headroom)
    }

    #[getter]
    fn max_gpus(&self) -> Option<u32> {
        self.0.max_gpus
    }

    #[getter]
    fn allowed<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let Some(names) = &self.0.allowed else {
            return Ok(None);
        };
        let names = names.iter().map(|name| name_object(py, name));
        PyTuple::new(py, names.collect::<PyResult<Vec<_>>>()?).map(Some)
    }

    #[getter]
    fn cpu(&self) -> &'static str {
        self.0.cpu.name()
    }

    #[getter]
    fn partial(&self) -> bool {
        self.0.partial
    }

    #[getter]
    fn priority(&self) -> i32 {
        self.0.priority
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<NewArguments<'py>> {
        let fields = PyDict::new(py);
        fields.set_item("strategy", self.strategy())?;
        fields.set_item("headroom_bytes", self.headroom_bytes())?;
        fields.set_item("headroom_by_gpu", self.headroom_by_gpu(py)?)?;
        fields.set_item("max_gpus", self.max_gpus())?;
        fields.set_item("allowed", self.allowed(py)?)?;
        fields.set_item("cpu", self.cpu())?;
        fields.set_item("partial", self.partial())?;
        fields.set_item("priority", self.priority())?;
        Ok((PyTuple::empty(py), fields))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        repr_from_fields("Policy", &self.__getnewargs_ex__(py)?.1)
    }
}

/// Indices and UUIDs; a lone string would otherwise be taken for a list of letters.
pub(crate) fn gpu_names(names: &Bound<'_, PyAny>) -> PyResult<Vec<GpuName>> {
    if names.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err(
            "allowed must be a sequence of GPU indices and UUIDs",
        ));
    }
    names
        .try_iter()?
        .map(|name| gpu_name("allowed", &name?))
        .collect()
}

fn gpu_name(key: &str, name: &Bound<'_, PyAny>) -> PyResult<GpuName> {
    if name.is_instance_of::<PyBool>() {
        let message = format!("{key}: a GPU is named by its index or UUID");
        return Err(PyTypeError::new_err(message));
    }
    if let Ok(uuid) = name.extract::<String>() {
        return Ok(GpuName::Uuid(uuid));
    }
    name.extract().map(GpuName::Index)
}

fn name_object<'py>(py: Python<'py>, name: &GpuName) -> PyResult<Bound<'py, PyAny>> {
    match name {
        GpuName::Index(index) => Ok(index.into_pyobject(py)?.into_any()),
        GpuName::Uuid(uuid) => Ok(PyString::new(py, uuid).into_any()),
    }
}

#[pyclass(frozen, eq, from_py_object, name = "Running", module = "llama_gpu")]
#[derive(Clone, PartialEq)]
pub(crate) struct PyRunning(pub(crate) Running);

#[pymethods]
impl PyRunning {
    #[expect(clippy::too_many_arguments, reason = "keywords of a Python class")]
    #[new]
    #[pyo3(signature = (id, bytes_by_gpu, *, busy=false, pinned=false, idle_seconds=0.0, priority=0,
        reload_seconds=None, recent_requests=None))]
    fn new(
        id: String,
        bytes_by_gpu: &Bound<'_, PyDict>,
        busy: bool,
        pinned: bool,
        idle_seconds: f64,
        priority: i32,
        reload_seconds: Option<f64>,
        recent_requests: Option<f64>,
    ) -> PyResult<Self> {
        let bytes_by_gpu = bytes_by_gpu
            .iter()
            .map(|(uuid, bytes)| Ok((uuid.extract()?, bytes.extract()?)))
            .collect::<PyResult<_>>()?;
        Ok(Self(Running {
            id,
            bytes_by_gpu,
            busy,
            pinned,
            idle_seconds,
            priority,
            reload_seconds,
            recent_requests,
        }))
    }

    #[getter]
    fn id(&self) -> &str {
        &self.0.id
    }

    #[getter]
    fn bytes_by_gpu<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let bytes = PyDict::new(py);
        for (uuid, held) in &self.0.bytes_by_gpu {
            bytes.set_item(uuid, held)?;
        }
        Ok(bytes)
    }

    #[getter]
    fn busy(&self) -> bool {
        self.0.busy
    }

    #[getter]
    fn pinned(&self) -> bool {
        self.0.pinned
    }

    #[getter]
    fn idle_seconds(&self) -> f64 {
        self.0.idle_seconds
    }

    #[getter]
    fn priority(&self) -> i32 {
        self.0.priority
    }

    #[getter]
    fn reload_seconds(&self) -> Option<f64> {
        self.0.reload_seconds
    }

    #[getter]
    fn recent_requests(&self) -> Option<f64> {
        self.0.recent_requests
    }

    #[getter]
    fn eviction_cost(&self) -> u64 {
        self.0.eviction_cost()
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<NewArguments<'py>> {
        let fields = PyDict::new(py);
        fields.set_item("id", self.id())?;
        fields.set_item("bytes_by_gpu", self.bytes_by_gpu(py)?)?;
        fields.set_item("busy", self.busy())?;
        fields.set_item("pinned", self.pinned())?;
        fields.set_item("idle_seconds", self.idle_seconds())?;
        fields.set_item("priority", self.priority())?;
        fields.set_item("reload_seconds", self.reload_seconds())?;
        fields.set_item("recent_requests", self.recent_requests())?;
        Ok((PyTuple::empty(py), fields))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        repr_from_fields("Running", &self.__getnewargs_ex__(py)?.1)
    }
}

#[pyclass(
    frozen,
    eq,
    hash,
    from_py_object,
    name = "PlacedDevice",
    module = "llama_gpu"
)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyPlacedDevice(pub(crate) PlacedDevice);

#[pymethods]
impl PyPlacedDevice {
    #[new]
    #[pyo3(signature = (*, uuid, index, layers, total_bytes))]
    fn new(uuid: String, index: u32, layers: u32, total_bytes: u64) -> Self {
        Self(PlacedDevice {
            uuid,
            index,
            layers,
            total_bytes,
        })
    }

    #[getter]
    fn uuid(&self) -> &str {
        &self.0.uuid
    }

    #[getter]
    fn index(&self) -> u32 {
        self.0.index
    }

    #[getter]
    fn layers(&self) -> u32 {
        self.0.layers
    }

    #[getter]
    fn total_bytes(&self) -> u64 {
        self.0.total_bytes
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<NewArguments<'py>> {
        let fields = PyDict::new(py);
        fields.set_item("uuid", self.uuid())?;
        fields.set_item("index", self.index())?;
        fields.set_item("layers", self.layers())?;
        fields.set_item("total_bytes", self.total_bytes())?;
        Ok((PyTuple::empty(py), fields))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        repr_from_fields("PlacedDevice", &self.__getnewargs_ex__(py)?.1)
    }
}

#[pyclass(frozen, eq, from_py_object, name = "Placement", module = "llama_gpu")]
#[derive(Clone, PartialEq)]
pub(crate) struct PyPlacement(pub(crate) Placement);

#[pymethods]
impl PyPlacement {
    #[new]
    #[pyo3(signature = (*, mode, devices, gpu_layers, tensor_split, evict, estimate, reason))]
    fn new(
        mode: &str,
        devices: Vec<PyPlacedDevice>,
        gpu_layers: u32,
        tensor_split: Vec<f32>,
        evict: Vec<String>,
        estimate: PyMemoryEstimate,
        reason: String,
    ) -> PyResult<Self> {
        let known = [Mode::Single, Mode::Multi, Mode::Partial, Mode::Cpu];
        let Some(mode) = known.into_iter().find(|one| one.name() == mode) else {
            let names = known.map(Mode::name).join("\", \"");
            return Err(PyValueError::new_err(format!(
                "mode: \"{mode}\" is none of \"{names}\""
            )));
        };
        let devices = devices.into_iter().map(|device| device.0).collect();
        let estimate = estimate.0;
        Ok(Self(Placement {
            mode,
            devices,
            gpu_layers,
            tensor_split,
            evict,
            estimate,
            reason,
        }))
    }

    #[getter]
    fn mode(&self) -> &'static str {
        self.0.mode.name()
    }

    #[getter]
    fn devices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.devices.iter().cloned().map(PyPlacedDevice))
    }

    #[getter]
    fn gpu_layers(&self) -> u32 {
        self.0.gpu_layers
    }

    #[getter]
    fn tensor_split<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.0.tensor_split)
    }

    #[getter]
    fn evict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.0.evict)
    }

    #[getter]
    fn estimate(&self) -> PyMemoryEstimate {
        PyMemoryEstimate(self.0.estimate.clone())
    }

    #[getter]
    fn reason(&self) -> &str {
        &self.0.reason
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<NewArguments<'py>> {
        let fields = PyDict::new(py);
        fields.set_item("mode", self.mode())?;
        fields.set_item("devices", self.devices(py)?)?;
        fields.set_item("gpu_layers", self.gpu_layers())?;
        fields.set_item("tensor_split", self.tensor_split(py)?)?;
        fields.set_item("evict", self.evict(py)?)?;
        fields.set_item("estimate", self.estimate())?;
        fields.set_item("reason", self.reason())?;
        Ok((PyTuple::empty(py), fields))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        repr_from_fields("Placement", &self.__getnewargs_ex__(py)?.1)
    }
}

/// Models that have been asked about, with what was estimated of them; the latest comes last.
static KNOWN: Mutex<Vec<KnownModel>> = Mutex::new(Vec::new());
const MOST_KNOWN: usize = 64;

struct KnownModel {
    facts: Arc<ModelFacts>,
    parsed: ParsedOptions,
    remembered: Remembered,
}

impl KnownModel {
    /// What is known of the model with these options; another thread finds nothing meanwhile.
    fn take(facts: Arc<ModelFacts>, parsed: ParsedOptions) -> Self {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |one: &KnownModel| {
            Arc::ptr_eq(&one.facts, &facts)
                && one.parsed.options == parsed.options
                && one.parsed.projector == parsed.projector
                && one.parsed.projector_on_host == parsed.projector_on_host
                && match (&one.parsed.draft, &parsed.draft) {
                    (None, None) => true,
                    (Some(one), Some(other)) => Arc::ptr_eq(one, other),
                    _ => false,
                }
        };
        match known.iter().rposition(same) {
            Some(place) => known.remove(place),
            None => Self {
                facts,
                parsed,
                remembered: Remembered::default(),
            },
        }
    }

    fn place(
        &mut self,
        gpus: &[&Gpu],
        policy: &Policy,
        running: &[&Running],
    ) -> Result<Placement, PlaceError> {
        let Self {
            facts,
            parsed,
            remembered,
        } = self;
        let companions = parsed.companions();
        place_again(
            facts,
            &parsed.options,
            companions,
            remembered,
            gpus,
            policy,
            running,
        )
    }

    fn keep(self) {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_KNOWN {
            known.remove(0);
        }
        known.push(self);
    }
}

#[pyfunction]
#[pyo3(
    signature = (model, gpus, *, policy=None, running=None, **options),
    text_signature = "(model, gpus, *, policy=None, running=(), context_length=0, parallel=1, kv_unified=False, \
                      batch=2048, micro_batch=512, max_outputs=None, flash_attention='auto', cache_type_k='f16', cache_type_v='f16', \
                      gpu_layers=None, cpu_moe_layers=0, kv_offload=True, swa_full=False, mmproj=None, \
                      mmproj_offload=True, draft=None, backend='cuda')"
)]
pub(crate) fn place(
    model: &Bound<'_, PyAny>,
    gpus: &Bound<'_, PyAny>,
    policy: Option<&Bound<'_, PyPolicy>>,
    running: Option<&Bound<'_, PyAny>>,
    options: Option<&Bound<'_, PyDict>>,
) -> PyResult<PyPlacement> {
    let py = model.py();
    let Question {
        header,
        facts,
        parsed,
        gpus,
        running,
    } = Question::read("place", model, gpus, running, options)?;
    let default = Policy::default();
    let policy = policy.map_or(&default, |policy| &policy.get().0);
    let running: Vec<&Running> = running.iter().map(|model| &model.get().0).collect();
    let mut known = KnownModel::take(facts, parsed);
    let placed = known.place(&gpus.as_refs(), policy, &running);
    known.keep();
    placed.map(PyPlacement).map_err(|error| match error {
        PlaceError::Estimate(error) => estimate_error(py, &header, &error),
        PlaceError::DoesNotFit(refusal) => does_not_fit(py, &refusal),
    })
}

/// The error to raise, or to hand out as a value.
pub(crate) fn does_not_fit(py: Python<'_>, refusal: &DoesNotFit) -> PyErr {
    let fields = PyDict::new(py);
    let free = PyDict::new(py);
    let filled = refusal
        .free_bytes_by_gpu
        .iter()
        .try_for_each(|(uuid, bytes)| free.set_item(uuid, bytes))
        .and_then(|()| fields.set_item("required_bytes", refusal.required_bytes))
        .and_then(|()| fields.set_item("short_by_bytes", refusal.short_by_bytes))
        .and_then(|()| fields.set_item("free_bytes_by_gpu", free))
        .and_then(|()| fields.set_item("smallest_change", refusal.smallest_change.as_deref()));
    match filled {
        Ok(()) => raise(py, "DoesNotFitError", &refusal.message, &fields),
        Err(failure) => failure,
    }
}
