//! `Gpu`, `GpuProcess`, `GpuSnapshot`, `snapshot_gpus` and `Monitor`.

use std::collections::BTreeMap;
use std::time::Duration;

use llama_gpu_core::gpu::{
    Gpu, GpuHealth, GpuProcess, GpuSnapshot, Host, Library, Monitor, MonitorOptions,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// `Type(key=repr(value), …)`, from the fields a constructor takes.
pub(crate) fn repr_from_fields(type_name: &str, fields: &Bound<'_, PyDict>) -> PyResult<String> {
    let mut shown = Vec::with_capacity(fields.len());
    for (key, value) in fields {
        shown.push(format!("{key}={}", value.repr()?.to_str()?));
    }
    Ok(format!("{type_name}({})", shown.join(", ")))
}

#[pyclass(
    frozen,
    eq,
    hash,
    from_py_object,
    name = "GpuProcess",
    module = "llama_gpu"
)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyGpuProcess(GpuProcess);

#[pymethods]
impl PyGpuProcess {
    #[new]
    #[pyo3(signature = (pid, used_bytes=None))]
    fn new(pid: u32, used_bytes: Option<u64>) -> Self {
        Self(GpuProcess { pid, used_bytes })
    }

    #[getter]
    fn pid(&self) -> u32 {
        self.0.pid
    }

    #[getter]
    fn used_bytes(&self) -> Option<u64> {
        self.0.used_bytes
    }

    fn __getnewargs__(&self) -> (u32, Option<u64>) {
        (self.0.pid, self.0.used_bytes)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let process = &slf.get().0;
        let fields = PyDict::new(slf.py());
        fields.set_item("pid", process.pid)?;
        fields.set_item("used_bytes", process.used_bytes)?;
        repr_from_fields("GpuProcess", &fields)
    }
}

#[pyclass(frozen, eq, from_py_object, name = "Gpu", module = "llama_gpu")]
#[derive(Clone, PartialEq)]
pub(crate) struct PyGpu(pub(crate) Gpu);

fn health_from(word: &str, reason: Option<String>) -> PyResult<GpuHealth> {
    match (word, reason) {
        ("ok", None) => Ok(GpuHealth::Ok),
        ("ok", Some(_)) => Err(PyValueError::new_err(
            "a GPU whose health is \"ok\" has no health_reason",
        )),
        ("degraded", reason) => Ok(GpuHealth::Degraded(reason.unwrap_or_default())),
        ("lost", reason) => Ok(GpuHealth::Lost(reason.unwrap_or_default())),
        (other, _) => Err(PyValueError::new_err(format!(
            "health is \"ok\", \"degraded\" or \"lost\", not {other:?}"
        ))),
    }
}

#[pymethods]
impl PyGpu {
    #[new]
    #[pyo3(signature = (*, index, uuid=None, name=None, total_bytes=None, free_bytes=None, used_bytes=None,
        reserved_bytes=None, utilization=None, temperature=None, power_watts=None, compute_capability=None,
        processes=None, mig=None, parent_uuid=None, unified=false, health="ok", health_reason=None,
        pci_bus_id=None, nvlink_peers=None))]
    #[expect(clippy::too_many_arguments, reason = "one keyword per field")]
    fn new(
        index: u32,
        uuid: Option<String>,
        name: Option<String>,
        total_bytes: Option<u64>,
        free_bytes: Option<u64>,
        used_bytes: Option<u64>,
        reserved_bytes: Option<u64>,
        utilization: Option<u32>,
        temperature: Option<u32>,
        power_watts: Option<f64>,
        compute_capability: Option<(u32, u32)>,
        processes: Option<Vec<PyGpuProcess>>,
        mig: Option<bool>,
        parent_uuid: Option<String>,
        unified: bool,
        health: &str,
        health_reason: Option<String>,
        pci_bus_id: Option<String>,
        nvlink_peers: Option<Vec<String>>,
    ) -> PyResult<Self> {
        if let (Some(free), Some(total)) = (free_bytes, total_bytes)
            && free > total
        {
            return Err(PyValueError::new_err(format!(
                "free_bytes ({free}) is more than total_bytes ({total})"
            )));
        }
        if utilization.is_some_and(|percent| percent > 100) {
            return Err(PyValueError::new_err(
                "utilization is a percentage, 0 to 100",
            ));
        }
        let derived_used = || {
            total_bytes?
                .saturating_sub(free_bytes?)
                .checked_sub(reserved_bytes.unwrap_or(0))
        };
        Ok(Self(Gpu {
            index,
            uuid: uuid.unwrap_or_else(|| format!("GPU-{index}")),
            name,
            total_bytes,
            free_bytes,
            used_bytes: used_bytes.or_else(derived_used),
            reserved_bytes,
            utilization,
            temperature,
            power_watts,
            compute_capability,
            processes: processes.map(|all| all.into_iter().map(|process| process.0).collect()),
            mig: mig.unwrap_or(parent_uuid.is_some()),
            parent_uuid,
            unified,
            health: health_from(health, health_reason)?,
            pci_bus_id,
            nvlink_peers: nvlink_peers.unwrap_or_default(),
        }))
    }

    #[getter]
    fn index(&self) -> u32 {
        self.0.index
    }

    #[getter]
    fn uuid(&self) -> &str {
        &self.0.uuid
    }

    #[getter]
    fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    #[getter]
    fn total_bytes(&self) -> Option<u64> {
        self.0.total_bytes
    }

    #[getter]
    fn free_bytes(&self) -> Option<u64> {
        self.0.free_bytes
    }

    #[getter]
    fn used_bytes(&self) -> Option<u64> {
        self.0.used_bytes
    }

    #[getter]
    fn reserved_bytes(&self) -> Option<u64> {
        self.0.reserved_bytes
    }

    #[getter]
    fn utilization(&self) -> Option<u32> {
        self.0.utilization
    }

    #[getter]
    fn temperature(&self) -> Option<u32> {
        self.0.temperature
    }

    #[getter]
    fn power_watts(&self) -> Option<f64> {
        self.0.power_watts
    }

    #[getter]
    fn compute_capability(&self) -> Option<(u32, u32)> {
        self.0.compute_capability
    }

    #[getter]
    fn processes<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let Some(processes) = &self.0.processes else {
            return Ok(None);
        };
        PyTuple::new(py, processes.iter().cloned().map(PyGpuProcess)).map(Some)
    }

    #[getter]
    fn mig(&self) -> bool {
        self.0.mig
    }

    #[getter]
    fn parent_uuid(&self) -> Option<&str> {
        self.0.parent_uuid.as_deref()
    }

    #[getter]
    fn unified(&self) -> bool {
        self.0.unified
    }

    #[getter]
    fn health(&self) -> &'static str {
        self.0.health.word()
    }

    #[getter]
    fn health_reason(&self) -> Option<&str> {
        self.0.health.reason()
    }

    #[getter]
    fn pci_bus_id(&self) -> Option<&str> {
        self.0.pci_bus_id.as_deref()
    }

    #[getter]
    fn nvlink_peers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.0.nvlink_peers)
    }

    #[getter]
    fn accepts_models(&self) -> bool {
        self.0.accepts_models()
    }

    /// The constructor's keywords with this GPU's values.
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let fields = PyDict::new(py);
        fields.set_item("index", self.index())?;
        fields.set_item("uuid", self.uuid())?;
        fields.set_item("name", self.name())?;
        fields.set_item("total_bytes", self.total_bytes())?;
        fields.set_item("free_bytes", self.free_bytes())?;
        fields.set_item("used_bytes", self.used_bytes())?;
        fields.set_item("reserved_bytes", self.reserved_bytes())?;
        fields.set_item("utilization", self.utilization())?;
        fields.set_item("temperature", self.temperature())?;
        fields.set_item("power_watts", self.power_watts())?;
        fields.set_item("compute_capability", self.compute_capability())?;
        fields.set_item("processes", self.processes(py)?)?;
        fields.set_item("mig", self.mig())?;
        fields.set_item("parent_uuid", self.parent_uuid())?;
        fields.set_item("unified", self.unified())?;
        fields.set_item("health", self.health())?;
        fields.set_item("health_reason", self.health_reason())?;
        fields.set_item("pci_bus_id", self.pci_bus_id())?;
        fields.set_item("nvlink_peers", self.nvlink_peers(py)?)?;
        Ok(fields)
    }

    #[pyo3(signature = (**changes))]
    fn replace<'py>(
        slf: &Bound<'py, Self>,
        changes: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let fields = slf.get().fields(slf.py())?;
        if let Some(changes) = changes {
            for (key, value) in changes {
                if !fields.contains(&key)? {
                    return Err(PyTypeError::new_err(format!("a Gpu has no field {key}")));
                }
                fields.set_item(key, value)?;
            }
            // A used amount that was derived from the old sizes would contradict the new ones.
            let resized = ["total_bytes", "free_bytes", "reserved_bytes"];
            if !changes.contains("used_bytes")?
                && resized
                    .iter()
                    .any(|key| changes.contains(key).unwrap_or(false))
            {
                fields.del_item("used_bytes")?;
            }
            if changes.contains("health")? && !changes.contains("health_reason")? {
                fields.del_item("health_reason")?;
            }
        }
        slf.get_type().call((), Some(&fields))
    }

    fn __getnewargs_ex__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        Ok((PyTuple::empty(py), self.fields(py)?))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        repr_from_fields("Gpu", &self.fields(py)?)
    }
}

#[pyclass(frozen, eq, from_py_object, name = "GpuSnapshot", module = "llama_gpu")]
#[derive(Clone, PartialEq)]
pub(crate) struct PyGpuSnapshot(pub(crate) GpuSnapshot);

#[pymethods]
impl PyGpuSnapshot {
    #[new]
    #[pyo3(signature = (gpus=Vec::new(), driver_version=None, error=None))]
    fn new(gpus: Vec<PyGpu>, driver_version: Option<String>, error: Option<String>) -> Self {
        Self(GpuSnapshot {
            gpus: gpus.into_iter().map(|gpu| gpu.0).collect(),
            driver_version,
            error,
        })
    }

    #[getter]
    fn gpus<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.gpus.iter().cloned().map(PyGpu))
    }

    #[getter]
    fn driver_version(&self) -> Option<&str> {
        self.0.driver_version.as_deref()
    }

    #[getter]
    fn error(&self) -> Option<&str> {
        self.0.error.as_deref()
    }

    fn __len__(&self) -> usize {
        self.0.gpus.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyIterator>> {
        self.gpus(py)?.try_iter()
    }

    fn __getnewargs__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Option<&str>, Option<&str>)> {
        Ok((self.gpus(py)?, self.driver_version(), self.error()))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let fields = PyDict::new(py);
        fields.set_item("gpus", self.gpus(py)?)?;
        fields.set_item("driver_version", self.driver_version())?;
        fields.set_item("error", self.error())?;
        repr_from_fields("GpuSnapshot", &fields)
    }
}

/// Reads all GPUs now; the interpreter is free while the driver answers.
#[pyfunction]
pub(crate) fn snapshot_gpus(py: Python<'_>) -> PyGpuSnapshot {
    PyGpuSnapshot(py.detach(llama_gpu_core::gpu::snapshot_gpus))
}

/// Whether the process ids in a snapshot mean the processes that have them here.
#[pyfunction]
pub(crate) fn has_host_pids() -> bool {
    Host::default().has_host_pids()
}

/// A time that a person gave in seconds.
fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    match Duration::try_from_secs_f64(value) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err(PyValueError::new_err(format!(
            "{name} is a number of seconds above 0, not {value}"
        ))),
    }
}

#[pyclass(frozen, name = "Monitor", module = "llama_gpu")]
pub(crate) struct PyMonitor(Monitor);

#[pymethods]
impl PyMonitor {
    #[new]
    #[pyo3(signature = (*, interval_seconds=5.0, deadline_seconds=3.0))]
    fn new(interval_seconds: f64, deadline_seconds: f64) -> PyResult<Self> {
        Ok(Self(Monitor::start(MonitorOptions {
            interval: Some(seconds("interval_seconds", interval_seconds)?),
            deadline: seconds("deadline_seconds", deadline_seconds)?,
            library: Library::from_environment(),
            ..MonitorOptions::default()
        })))
    }

    fn snapshot(&self) -> PyGpuSnapshot {
        PyGpuSnapshot(self.0.reading().snapshot)
    }

    fn refresh(&self, py: Python<'_>) -> PyGpuSnapshot {
        PyGpuSnapshot(py.detach(|| self.0.refresh().snapshot))
    }

    #[getter]
    fn ages(&self) -> BTreeMap<String, f64> {
        let ages = self.0.reading().ages.into_iter();
        ages.map(|(uuid, age)| (uuid, age.as_secs_f64())).collect()
    }

    #[getter]
    fn age_seconds(&self) -> Option<f64> {
        self.0.reading().age.map(|age| age.as_secs_f64())
    }

    fn close(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.close())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyTuple>) {
        self.close(py);
    }
}
