//! `Header`, `Tensor`, `Shard` and `read_header`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use llama_gpu_core::gguf::{
    GgmlType, Header, HeaderCache, ReadError, TensorInfo, read_header as read,
};
use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::errors::raise;
use crate::metadata::PyMetadata;

/// One entry holds some 10 to 300 KB: names of tensors, strings, small arrays.
static CACHE: LazyLock<HeaderCache> = LazyLock::new(|| HeaderCache::new(256));

#[pyclass(frozen, eq, name = "Header", module = "llama_gpu")]
pub(crate) struct PyHeader {
    pub(crate) inner: Arc<Header>,
    tensors: PyOnceLock<Py<PyTuple>>,
}

impl PartialEq for PyHeader {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner) || self.inner == other.inner
    }
}

impl From<Arc<Header>> for PyHeader {
    fn from(inner: Arc<Header>) -> Self {
        Self {
            inner,
            tensors: PyOnceLock::new(),
        }
    }
}

#[pymethods]
impl PyHeader {
    #[getter]
    fn version(&self) -> u32 {
        self.inner.version
    }

    #[getter]
    fn byte_order(&self) -> &'static str {
        self.inner.byte_order.name()
    }

    #[getter]
    fn alignment(&self) -> u64 {
        self.inner.alignment
    }

    #[getter]
    fn architecture(&self) -> Option<&str> {
        self.inner.architecture()
    }

    #[getter]
    fn metadata(&self) -> PyMetadata {
        PyMetadata::from(Arc::clone(&self.inner))
    }

    #[getter]
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let tuple = self.tensors.get_or_try_init(py, || {
            let tensors = self.inner.tensors.iter().cloned().map(PyTensor);
            let tensors: Vec<_> = tensors
                .map(|tensor| Py::new(py, tensor))
                .collect::<PyResult<_>>()?;
            PyTuple::new(py, tensors).map(Bound::unbind)
        })?;
        Ok(tuple.bind(py).clone())
    }

    #[getter]
    fn parameter_count(&self) -> u64 {
        self.inner.parameter_count()
    }

    #[getter]
    fn quantization(&self) -> Option<&'static str> {
        self.inner.quantization()
    }

    #[getter]
    fn trained_context_length(&self) -> Option<u64> {
        self.inner.trained_context_length()
    }

    #[getter]
    fn file_bytes(&self) -> u64 {
        self.inner.file_bytes
    }

    #[getter]
    fn path<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyString>> {
        path_text(py, &self.inner.path)
    }

    #[getter]
    fn shards<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let shards: Vec<PyShard> = self
            .inner
            .shards
            .iter()
            .map(|shard| PyShard {
                path: shard.path.clone(),
                file_bytes: shard.file_bytes,
                data_offset: shard.data_offset,
            })
            .collect();
        PyTuple::new(py, shards)
    }

    fn __repr__(&self) -> String {
        let header = &self.inner;
        let word = |word: Option<&str>| word.map_or("None".to_owned(), |word| format!("'{word}'"));
        format!(
            "Header(path={:?}, architecture={}, quantization={}, parameter_count={}, tensors={}, file_bytes={})",
            header.path.to_string_lossy(),
            word(header.architecture()),
            word(header.quantization()),
            header.parameter_count(),
            header.tensors.len(),
            header.file_bytes
        )
    }

    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyString>,))> {
        Ok((
            py.import("llama_gpu")?.getattr("read_header")?,
            (self.path(py)?,),
        ))
    }
}

#[pyclass(frozen, eq, name = "Tensor", module = "llama_gpu")]
#[derive(PartialEq)]
pub(crate) struct PyTensor(TensorInfo);

#[pymethods]
impl PyTensor {
    #[new]
    #[pyo3(signature = (*, name, shape, r#type, bytes, offset, shard = 0))]
    fn new(
        name: String,
        shape: Vec<u64>,
        r#type: &str,
        bytes: u64,
        offset: u64,
        shard: u32,
    ) -> PyResult<Self> {
        let ggml_type = GgmlType::from_name(r#type)
            .ok_or_else(|| PyValueError::new_err(format!("no ggml type is called {type:?}")))?;
        let mut dims = [1; 4];
        if shape.len() > dims.len() {
            return Err(PyValueError::new_err("a tensor has at most 4 dimensions"));
        }
        let mut n_dims = 0_u32;
        for (dim, given) in dims.iter_mut().zip(shape) {
            *dim = given;
            n_dims = n_dims.saturating_add(1);
        }
        let name = name.into();
        Ok(Self(TensorInfo {
            name,
            dims,
            n_dims,
            ggml_type,
            offset,
            bytes,
            shard,
        }))
    }

    fn __getnewargs_ex__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let fields = PyDict::new(py);
        fields.set_item("name", self.name())?;
        fields.set_item("shape", self.shape(py)?)?;
        fields.set_item("type", self.r#type())?;
        fields.set_item("bytes", self.bytes())?;
        fields.set_item("offset", self.offset())?;
        fields.set_item("shard", self.shard())?;
        Ok((PyTuple::empty(py), fields))
    }

    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.shape())
    }

    #[getter]
    fn r#type(&self) -> &'static str {
        self.0.ggml_type.name()
    }

    #[getter]
    fn bytes(&self) -> u64 {
        self.0.bytes
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.0.offset
    }

    #[getter]
    fn shard(&self) -> u32 {
        self.0.shard
    }

    fn __repr__(&self) -> String {
        let TensorInfo {
            name,
            ggml_type,
            bytes,
            offset,
            shard,
            ..
        } = &self.0;
        let shape = match self.0.shape() {
            [only] => format!("({only},)"),
            shape => format!(
                "({})",
                shape
                    .iter()
                    .map(u64::to_string)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        };
        format!(
            "Tensor(name={name:?}, shape={shape}, type='{}', bytes={bytes}, offset={offset}, shard={shard})",
            ggml_type.name()
        )
    }
}

#[pyclass(frozen, eq, name = "Shard", module = "llama_gpu")]
#[derive(PartialEq)]
pub(crate) struct PyShard {
    path: PathBuf,
    #[pyo3(get)]
    file_bytes: u64,
    #[pyo3(get)]
    data_offset: u64,
}

#[pymethods]
impl PyShard {
    #[new]
    #[pyo3(signature = (*, path, file_bytes, data_offset))]
    fn new(path: PathBuf, file_bytes: u64, data_offset: u64) -> Self {
        Self {
            path,
            file_bytes,
            data_offset,
        }
    }

    fn __getnewargs_ex__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let fields = PyDict::new(py);
        fields.set_item("path", self.path(py)?)?;
        fields.set_item("file_bytes", self.file_bytes)?;
        fields.set_item("data_offset", self.data_offset)?;
        Ok((PyTuple::empty(py), fields))
    }

    #[getter]
    fn path<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyString>> {
        path_text(py, &self.path)
    }

    fn __repr__(&self) -> String {
        let (path, file_bytes, data_offset) = (
            self.path.to_string_lossy(),
            self.file_bytes,
            self.data_offset,
        );
        format!("Shard(path={path:?}, file_bytes={file_bytes}, data_offset={data_offset})")
    }
}

#[pyfunction]
#[pyo3(signature = (path, *, cached = true))]
#[allow(
    clippy::needless_pass_by_value,
    reason = "extracted from any path-like object"
)]
pub(crate) fn read_header(py: Python<'_>, path: PathBuf, cached: bool) -> PyResult<PyHeader> {
    let header = if cached {
        cached_header(py, &path)?
    } else {
        let header = py
            .detach(|| read(&path))
            .map_err(|error| read_error(py, &error))?;
        Arc::new(header)
    };
    Ok(header.into())
}

/// The header of a `Header` or of the model at a path, from the cache if it has it.
pub(crate) fn header_from_any(model: &Bound<'_, PyAny>) -> PyResult<Arc<Header>> {
    if let Ok(header) = model.cast::<PyHeader>() {
        return Ok(Arc::clone(&header.get().inner));
    }
    let Ok(path) = model.extract::<PathBuf>() else {
        let found = model.get_type().name()?;
        return Err(PyTypeError::new_err(format!(
            "expected a path or a Header, not {found}"
        )));
    };
    cached_header(model.py(), &path)
}

fn cached_header(py: Python<'_>, path: &Path) -> PyResult<Arc<Header>> {
    py.detach(|| CACHE.get(path, SystemTime::now()))
        .map_err(|error| read_error(py, &error))
}

/// `InvalidGgufError` for a file that is refused, Python's own `OSError` for one that cannot be read.
pub(crate) fn read_error(py: Python<'_>, error: &ReadError) -> PyErr {
    match error {
        ReadError::Io { path, source } => os_error(py, path, source),
        ReadError::Invalid { path, error: gguf } => {
            let fields = PyDict::new(py);
            let filled = path_text(py, path)
                .and_then(|path| fields.set_item("path", path))
                .and_then(|()| fields.set_item("offset", gguf.offset))
                .and_then(|()| fields.set_item("reason", gguf.kind.reason()));
            match filled {
                Ok(()) => raise(py, "InvalidGgufError", &error.to_string(), &fields),
                Err(failure) => failure,
            }
        }
    }
}

/// `OSError(errno, strerror, filename)`, which becomes `FileNotFoundError` and the like by itself.
fn os_error(py: Python<'_>, path: &Path, source: &io::Error) -> PyErr {
    let build = || -> PyResult<PyErr> {
        let number = match source.raw_os_error() {
            Some(number) => number.into_pyobject(py)?.into_any(),
            None if source.kind() == io::ErrorKind::IsADirectory => {
                py.import("errno")?.getattr("EISDIR")?
            }
            None => py.import("errno")?.getattr("EINVAL")?,
        };
        let words = match source.raw_os_error() {
            None if source.kind() != io::ErrorKind::IsADirectory => source.to_string(),
            _ => py
                .import("os")?
                .call_method1("strerror", (&number,))?
                .extract()?,
        };
        Ok(PyOSError::new_err((
            number.unbind(),
            words,
            path_text(py, path)?.unbind(),
        )))
    };
    build().unwrap_or_else(|failure| failure)
}

fn path_text<'py>(py: Python<'py>, path: &Path) -> PyResult<Bound<'py, PyString>> {
    Ok(path.as_os_str().into_pyobject(py)?)
}
