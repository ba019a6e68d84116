//! `estimate`, `MemoryEstimate` and `DeviceMemory`.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use llama_gpu_core::estimate::{
    AdapterFacts, Backend, Companions, CpuMoe, DeviceMemory, EstimateError, EstimateOptions,
    FlashAttention, MemoryEstimate, ProjectorFacts, estimate_with,
};
use llama_gpu_core::gguf::{GgmlType, Header};
use llama_gpu_core::model::ModelFacts;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::errors::raise;
use crate::gguf::header_from_any;

/// Facts of the headers that are alive. A `Weak` keeps its address from being reused,
/// so that the address is the header's identity.
static FACTS: LazyLock<Mutex<HashMap<usize, KnownFacts>>> = LazyLock::new(Mutex::default);
const MAX_FACTS: usize = 512;

struct KnownFacts {
    header: Weak<Header>,
    facts: Arc<ModelFacts>,
}

/// The facts of a header, made once.
///
/// # Errors
/// `UnsupportedModelError` where the header describes no model that can be estimated.
pub(crate) fn facts_of(py: Python<'_>, header: &Arc<Header>) -> PyResult<Arc<ModelFacts>> {
    let address = Arc::as_ptr(header).addr();
    let mut known = FACTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(entry) = known.get(&address) {
        return Ok(Arc::clone(&entry.facts));
    }
    let facts = ModelFacts::from_header(header).map_err(|e| estimate_error(py, header, &e))?;
    let facts = Arc::new(facts);
    if known.len() >= MAX_FACTS {
        known.retain(|_, entry| entry.header.strong_count() > 0);
    }
    let header = Arc::downgrade(header);
    let entry = KnownFacts {
        header,
        facts: Arc::clone(&facts),
    };
    known.insert(address, entry);
    Ok(facts)
}

/// `ValueError` for an option, `UnsupportedModelError` for a header.
pub(crate) fn estimate_error(py: Python<'_>, header: &Header, error: &EstimateError) -> PyErr {
    let architecture = match error {
        EstimateError::Option { .. } => return PyValueError::new_err(error.to_string()),
        EstimateError::Header { .. } => header.architecture(),
        EstimateError::Unsupported { architecture, .. } => architecture.as_deref(),
    };
    let fields = PyDict::new(py);
    let path = header.path.to_string_lossy();
    let filled = fields
        .set_item("path", &path)
        .and_then(|()| fields.set_item("architecture", architecture));
    match filled {
        Ok(()) => raise(
            py,
            "UnsupportedModelError",
            &format!("{path}: {error}"),
            &fields,
        ),
        Err(failure) => failure,
    }
}

/// The keyword arguments of `estimate`, as others take them too.
#[derive(Default)]
pub(crate) struct ParsedOptions {
    pub(crate) options: EstimateOptions,
    pub(crate) projector: Option<ProjectorFacts>,
    pub(crate) projector_on_host: bool,
    pub(crate) draft: Option<Arc<ModelFacts>>,
    adapter_headers: Vec<Arc<Header>>,
}

impl ParsedOptions {
    /// Parses what `estimate` takes by keyword.
    ///
    /// # Errors
    /// `TypeError` for an unknown keyword or a value of the wrong type, `ValueError` for one
    /// out of range, and what reading the headers of `mmproj` and `draft` raises.
    pub(crate) fn from_keywords(keywords: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let mut parsed = Self::default();
        for (key, value) in keywords.into_iter().flatten() {
            let key: String = key.extract()?;
            if key == "lora" {
                let adapters: Vec<Bound<'_, PyAny>> = value.extract()?;
                let headers = adapters.iter().map(header_from_any);
                parsed.adapter_headers = headers.collect::<PyResult<_>>()?;
            } else if !parsed.set(&key, &value)? {
                return Err(PyTypeError::new_err(format!(
                    "estimate() got an unexpected keyword argument '{key}'"
                )));
            }
        }
        Ok(parsed)
    }

    /// Sets one option; false if there is none of that name.
    pub(crate) fn set(&mut self, key: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
        let options = &mut self.options;
        match key {
            "context_length" => options.context_length = whole(key, value)?,
            "parallel" => options.parallel = whole(key, value)?,
            "kv_unified" => options.kv_unified = value.extract()?,
            "batch" => options.batch = whole(key, value)?,
            "micro_batch" => options.micro_batch = whole(key, value)?,
            "max_outputs" => {
                options.max_outputs = if value.is_none() {
                    None
                } else {
                    Some(whole(key, value)?)
                }
            }
            "flash_attention" => options.flash_attention = word(key, value, &FLASH_ATTENTION)?,
            "cache_type_k" => options.cache_type_k = cache_type(key, value)?,
            "cache_type_v" => options.cache_type_v = cache_type(key, value)?,
            "gpu_layers" => {
                options.gpu_layers = if value.is_none() {
                    None
                } else {
                    Some(whole(key, value)?)
                }
            }
            "devices" => options.devices = whole(key, value)?,
            "tensor_split" => options.tensor_split = value.extract()?,
            "cpu_moe_layers" => {
                options.cpu_moe_layers = match value.extract::<&str>() {
                    Ok("all") => CpuMoe::All,
                    Ok(_) => return Err(wrong(key, "must be a whole number or \"all\"")),
                    Err(_) => match whole(key, value)? {
                        0 => CpuMoe::None,
                        layers => CpuMoe::Layers(layers),
                    },
                }
            }
            "kv_offload" => options.kv_offload = value.extract()?,
            "swa_full" => options.swa_full = value.extract()?,
            "backend" => options.backend = word(key, value, &BACKENDS)?,
            "compute_capability" => options.compute_capability = value.extract()?,
            "mmproj" if value.is_none() => self.projector = None,
            "mmproj" => {
                let header = header_from_any(value)?;
                let facts = ProjectorFacts::from_header(&header)
                    .map_err(|e| estimate_error(value.py(), &header, &e))?;
                self.projector = Some(facts);
            }
            "mmproj_offload" => self.projector_on_host = !value.extract::<bool>()?,
            "draft" if value.is_none() => self.draft = None,
            "draft" => self.draft = Some(facts_of(value.py(), &header_from_any(value)?)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The adapters, as they fit this model.
    ///
    /// # Errors
    /// `UnsupportedModelError` for a file that is no adapter, or one for another model.
    fn adapters(&self, py: Python<'_>, facts: &ModelFacts) -> PyResult<Vec<AdapterFacts>> {
        let adapters = self.adapter_headers.iter().map(|header| {
            AdapterFacts::from_header(header, facts).map_err(|e| estimate_error(py, header, &e))
        });
        adapters.collect()
    }

    pub(crate) fn companions(&self) -> Companions<'_> {
        Companions {
            projector: self.projector.as_ref(),
            projector_on_host: self.projector_on_host,
            draft: self.draft.as_deref(),
            adapters: &[],
        }
    }
}

const FLASH_ATTENTION: [(&str, FlashAttention); 3] = [
    ("on", FlashAttention::On),
    ("off", FlashAttention::Off),
    ("auto", FlashAttention::Auto),
];
const BACKENDS: [(&str, Backend); 2] = [("cuda", Backend::Cuda), ("generic", Backend::Generic)];

fn wrong(key: &str, must: &str) -> PyErr {
    PyValueError::new_err(format!("{key} {must}"))
}

fn whole(key: &str, value: &Bound<'_, PyAny>) -> PyResult<u32> {
    let number: i128 = value.extract().map_err(|_| {
        PyTypeError::new_err(format!(
            "{key} must be a whole number, not {}",
            value.get_type().name().map_or_else(
                |_| "something else".to_owned(),
                |name| name.to_string_lossy().into_owned()
            )
        ))
    })?;
    u32::try_from(number).map_err(|_| wrong(key, "must be between 0 and 4294967295"))
}

fn word<T: Copy>(key: &str, value: &Bound<'_, PyAny>, words: &[(&str, T)]) -> PyResult<T> {
    let given: String = value
        .extract()
        .map_err(|_| PyTypeError::new_err(format!("{key} must be a string")))?;
    words
        .iter()
        .find(|(word, _)| *word == given)
        .map(|(_, meaning)| *meaning)
        .ok_or_else(|| {
            let known: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
            wrong(
                key,
                &format!("must be one of {}, not {given:?}", known.join(", ")),
            )
        })
}

fn cache_type(key: &str, value: &Bound<'_, PyAny>) -> PyResult<GgmlType> {
    let given: String = value
        .extract()
        .map_err(|_| PyTypeError::new_err(format!("{key} must be a string")))?;
    GgmlType::from_name(&given.to_ascii_uppercase())
        .ok_or_else(|| wrong(key, &format!("is no ggml type: {given:?}")))
}

#[pyclass(
    frozen,
    eq,
    hash,
    from_py_object,
    name = "DeviceMemory",
    module = "llama_gpu"
)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PyDeviceMemory(pub(crate) DeviceMemory);

#[pymethods]
impl PyDeviceMemory {
    #[new]
    #[pyo3(signature = (*, weights_bytes=0, context_bytes=0, compute_bytes=0, overhead_bytes=0, layers=0))]
    fn new(
        weights_bytes: u64,
        context_bytes: u64,
        compute_bytes: u64,
        overhead_bytes: u64,
        layers: u32,
    ) -> Self {
        Self(DeviceMemory {
            weights_bytes,
            context_bytes,
            compute_bytes,
            overhead_bytes,
            layers,
        })
    }

    #[getter]
    fn weights_bytes(&self) -> u64 {
        self.0.weights_bytes
    }

    #[getter]
    fn context_bytes(&self) -> u64 {
        self.0.context_bytes
    }

    #[getter]
    fn compute_bytes(&self) -> u64 {
        self.0.compute_bytes
    }

    #[getter]
    fn overhead_bytes(&self) -> u64 {
        self.0.overhead_bytes
    }

    #[getter]
    fn total_bytes(&self) -> u64 {
        self.0.total_bytes()
    }

    #[getter]
    fn layers(&self) -> u32 {
        self.0.layers
    }

    fn __getnewargs_ex__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let fields = PyDict::new(py);
        fields.set_item("weights_bytes", self.0.weights_bytes)?;
        fields.set_item("context_bytes", self.0.context_bytes)?;
        fields.set_item("compute_bytes", self.0.compute_bytes)?;
        fields.set_item("overhead_bytes", self.0.overhead_bytes)?;
        fields.set_item("layers", self.0.layers)?;
        Ok((PyTuple::empty(py), fields))
    }

    fn __repr__(&self) -> String {
        let DeviceMemory {
            weights_bytes,
            context_bytes,
            compute_bytes,
            overhead_bytes,
            layers,
        } = self.0;
        format!(
            "DeviceMemory(weights_bytes={weights_bytes}, context_bytes={context_bytes}, \
             compute_bytes={compute_bytes}, overhead_bytes={overhead_bytes}, layers={layers})"
        )
    }
}

#[pyclass(
    frozen,
    eq,
    hash,
    from_py_object,
    name = "MemoryEstimate",
    module = "llama_gpu"
)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyMemoryEstimate(pub(crate) MemoryEstimate);

#[pymethods]
impl PyMemoryEstimate {
    #[new]
    #[pyo3(signature = (*, devices, host, basis, context_length, checkpoint_bytes=0))]
    fn new(
        devices: Vec<PyDeviceMemory>,
        host: PyDeviceMemory,
        basis: &Bound<'_, PyAny>,
        context_length: u32,
        checkpoint_bytes: u64,
    ) -> PyResult<Self> {
        use llama_gpu_core::estimate::Basis;
        let known = [
            Basis::Exact,
            Basis::GenericRules,
            Basis::Projected,
            Basis::Measured,
        ]
        .map(|one| (one.name(), one));
        Ok(Self(MemoryEstimate {
            devices: devices.into_iter().map(|device| device.0).collect(),
            host: host.0,
            basis: word("basis", basis, &known)?,
            context_length,
            checkpoint_bytes,
        }))
    }

    #[getter]
    fn devices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.devices.iter().copied().map(PyDeviceMemory))
    }

    #[getter]
    fn host(&self) -> PyDeviceMemory {
        PyDeviceMemory(self.0.host)
    }

    #[getter]
    fn basis(&self) -> &'static str {
        self.0.basis.name()
    }

    #[getter]
    fn context_length(&self) -> u32 {
        self.0.context_length
    }

    #[getter]
    fn checkpoint_bytes(&self) -> u64 {
        self.0.checkpoint_bytes
    }

    #[getter]
    fn total_device_bytes(&self) -> u64 {
        self.0.total_device_bytes()
    }

    fn __getnewargs_ex__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let fields = PyDict::new(py);
        fields.set_item("devices", self.devices(py)?)?;
        fields.set_item("host", self.host())?;
        fields.set_item("basis", self.basis())?;
        fields.set_item("context_length", self.context_length())?;
        fields.set_item("checkpoint_bytes", self.checkpoint_bytes())?;
        Ok((PyTuple::empty(py), fields))
    }

    fn __repr__(&self) -> String {
        let devices: Vec<String> = self
            .0
            .devices
            .iter()
            .map(|device| PyDeviceMemory(*device).__repr__())
            .collect();
        let comma = if devices.len() == 1 { "," } else { "" };
        format!(
            "MemoryEstimate(devices=({}{comma}), host={}, basis='{}', context_length={}, \
             checkpoint_bytes={})",
            devices.join(", "),
            PyDeviceMemory(self.0.host).__repr__(),
            self.0.basis.name(),
            self.0.context_length,
            self.0.checkpoint_bytes
        )
    }
}

#[pyfunction]
#[pyo3(
    signature = (model, **options),
    text_signature = "(model, *, context_length=0, parallel=1, kv_unified=False, batch=2048, micro_batch=512, \
                      max_outputs=None, flash_attention='auto', cache_type_k='f16', cache_type_v='f16', gpu_layers=None, devices=1, \
                      tensor_split=None, cpu_moe_layers=0, kv_offload=True, swa_full=False, mmproj=None, \
                      mmproj_offload=True, draft=None, lora=(), backend='cuda', compute_capability=None)"
)]
pub(crate) fn estimate(
    model: &Bound<'_, PyAny>,
    options: Option<&Bound<'_, PyDict>>,
) -> PyResult<PyMemoryEstimate> {
    let py = model.py();
    let header = header_from_any(model)?;
    let parsed = ParsedOptions::from_keywords(options)?;
    let facts = facts_of(py, &header)?;
    let adapters = parsed.adapters(py, &facts)?;
    let companions = Companions {
        adapters: &adapters,
        ..parsed.companions()
    };
    estimate_with(&facts, &parsed.options, companions)
        .map(PyMemoryEstimate)
        .map_err(|error| estimate_error(py, &header, &error))
}
