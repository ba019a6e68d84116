//! `Metadata` and `MetadataArray`: decoded when asked for.

use std::sync::{Arc, OnceLock};

use llama_gpu_core::gguf::{Array, Header, Items, Value};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyIndexError, PyKeyError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PySlice, PyTuple};

use crate::gguf::{PyHeader, read_error};

#[pyclass(frozen, eq, mapping, name = "Metadata", module = "llama_gpu")]
pub(crate) struct PyMetadata {
    header: Arc<Header>,
}

impl PartialEq for PyMetadata {
    fn eq(&self, other: &Self) -> bool {
        self.header.metadata == other.header.metadata
    }
}

impl From<Arc<Header>> for PyMetadata {
    fn from(header: Arc<Header>) -> Self {
        Self { header }
    }
}

impl PyMetadata {
    fn find<'py>(&self, py: Python<'py>, key: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        let value = self.header.metadata.get(key);
        value
            .map(|value| to_python(py, &self.header, key, value))
            .transpose()
    }
}

#[pymethods]
impl PyMetadata {
    fn __len__(&self) -> usize {
        self.header.metadata.len()
    }

    fn __contains__(&self, key: &Bound<'_, PyAny>) -> bool {
        key.extract::<&str>()
            .is_ok_and(|key| self.header.metadata.get(key).is_some())
    }

    fn __getitem__<'py>(&self, key: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let found = match key.extract::<&str>() {
            Ok(name) => self.find(key.py(), name)?,
            Err(_) => None,
        };
        found.ok_or_else(|| PyKeyError::new_err(key.clone().unbind()))
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let keys = PyTuple::new(py, self.header.metadata.iter().map(|(key, _)| key))?;
        Ok(keys.try_iter()?.into_any())
    }

    #[pyo3(signature = (key, default = None, /))]
    fn get<'py>(
        &self,
        key: &Bound<'py, PyAny>,
        default: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let found = match key.extract::<&str>() {
            Ok(name) => self.find(key.py(), name)?,
            Err(_) => None,
        };
        Ok(found.or(default))
    }

    fn keys(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        view(slf, "KeysView")
    }

    fn values(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        view(slf, "ValuesView")
    }

    fn items(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        view(slf, "ItemsView")
    }

    fn __repr__(&self) -> String {
        format!(
            "<Metadata of {:?}: {} entries>",
            self.header.path.to_string_lossy(),
            self.header.metadata.len()
        )
    }

    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, (PyHeader, &'static str))> {
        let getattr = py.import("builtins")?.getattr("getattr")?;
        Ok((getattr, (Arc::clone(&self.header).into(), "metadata")))
    }
}

fn view<'py>(mapping: Bound<'py, PyMetadata>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    mapping
        .py()
        .import("collections.abc")?
        .getattr(name)?
        .call1((mapping,))
}

#[pyclass(frozen, sequence, name = "MetadataArray", module = "llama_gpu")]
pub(crate) struct PyMetadataArray {
    header: Arc<Header>,
    key: String,
    array: Array,
    items: OnceLock<Items>,
}

impl PyMetadataArray {
    fn items(&self, py: Python<'_>) -> PyResult<&Items> {
        if let Some(items) = self.items.get() {
            return Ok(items);
        }
        let items = py
            .detach(|| self.header.read_array(&self.array))
            .map_err(|error| read_error(py, &error))?;
        Ok(self.items.get_or_init(|| items))
    }

    fn item<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyAny>> {
        match self.items(py)?.get(index) {
            Some(value) => to_python(py, &self.header, &self.key, &value),
            None => Err(PyIndexError::new_err("array index out of range")),
        }
    }
}

#[pymethods]
impl PyMetadataArray {
    #[getter]
    fn element_type(&self) -> &'static str {
        self.array.element.name()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.array.len)?)
    }

    fn __getitem__<'py>(&self, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = index.py();
        let length = isize::try_from(self.array.len)?;
        if let Ok(slice) = index.cast::<PySlice>() {
            let range = slice.indices(length)?;
            let chosen = PyList::empty(py);
            let mut at = range.start;
            for _ in 0..range.slicelength {
                chosen.append(self.item(py, usize::try_from(at)?)?)?;
                at = at.saturating_add(range.step);
            }
            return Ok(chosen.into_any());
        }
        let index = index.extract::<isize>()?;
        let index = if index < 0 {
            index.saturating_add(length)
        } else {
            index
        };
        match usize::try_from(index) {
            Ok(index) => self.item(py, index),
            Err(_) => Err(PyIndexError::new_err("array index out of range")),
        }
    }

    fn __eq__(&self, py: Python<'_>, other: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let other = match other.cast::<Self>() {
            Ok(other) => other.get().list(py)?.into_any(),
            Err(_) if other.is_instance_of::<PyTuple>() => other
                .try_iter()?
                .collect::<PyResult<Vec<_>>>()?
                .into_bound_py_any(py)?,
            Err(_) if other.is_instance_of::<PyList>() => other.clone(),
            Err(_) => return Ok(py.NotImplemented()),
        };
        self.list(py)?.eq(other)?.into_py_any(py)
    }

    fn __repr__(&self) -> String {
        format!(
            "<MetadataArray {:?}: {} × {}>",
            self.key,
            self.array.len,
            self.array.element.name()
        )
    }

    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, (PyMetadata, String))> {
        let getitem = py.import("operator")?.getattr("getitem")?;
        Ok((getitem, (Arc::clone(&self.header).into(), self.key.clone())))
    }
}

impl PyMetadataArray {
    fn list<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let items = self.items(py)?;
        let list = PyList::empty(py);
        for value in items.iter() {
            list.append(to_python(py, &self.header, &self.key, &value)?)?;
        }
        Ok(list)
    }
}

/// Small arrays become tuples, others read their elements when asked.
fn to_python<'py>(
    py: Python<'py>,
    header: &Arc<Header>,
    key: &str,
    value: &Value,
) -> PyResult<Bound<'py, PyAny>> {
    match value {
        Value::U8(value) => value.into_bound_py_any(py),
        Value::I8(value) => value.into_bound_py_any(py),
        Value::U16(value) => value.into_bound_py_any(py),
        Value::I16(value) => value.into_bound_py_any(py),
        Value::U32(value) => value.into_bound_py_any(py),
        Value::I32(value) => value.into_bound_py_any(py),
        Value::F32(value) => value.into_bound_py_any(py),
        Value::Bool(value) => value.into_bound_py_any(py),
        Value::U64(value) => value.into_bound_py_any(py),
        Value::I64(value) => value.into_bound_py_any(py),
        Value::F64(value) => value.into_bound_py_any(py),
        Value::String(text) => text.as_ref().into_bound_py_any(py),
        Value::Bytes(bytes) => Ok(PyBytes::new(py, bytes).into_any()),
        Value::LongString(place) => {
            let bytes = py
                .detach(|| header.read_place(*place))
                .map_err(|error| read_error(py, &error))?;
            match std::str::from_utf8(&bytes) {
                Ok(text) => text.into_bound_py_any(py),
                Err(_) => Ok(PyBytes::new(py, &bytes).into_any()),
            }
        }
        Value::Array(array) => match array.items() {
            Some(items) => {
                let values: Vec<_> = items
                    .iter()
                    .map(|value| to_python(py, header, key, &value))
                    .collect::<PyResult<_>>()?;
                Ok(PyTuple::new(py, values)?.into_any())
            }
            None => PyMetadataArray {
                header: Arc::clone(header),
                key: key.to_owned(),
                array: array.as_ref().clone(),
                items: OnceLock::new(),
            }
            .into_bound_py_any(py),
        },
    }
}

/// Lets `isinstance(header.metadata, Mapping)` and the like hold.
pub(crate) fn register(py: Python<'_>) -> PyResult<()> {
    let abc = py.import("collections.abc")?;
    abc.getattr("Mapping")?
        .call_method1("register", (py.get_type::<PyMetadata>(),))?;
    abc.getattr("Sequence")?
        .call_method1("register", (py.get_type::<PyMetadataArray>(),))?;
    Ok(())
}
