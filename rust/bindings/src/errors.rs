//! Raising the classes of `llama_gpu.errors` from Rust.

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Builds `llama_gpu.errors.<class>(message, **fields)` as a `PyErr`.
///
/// `errors.py` imports nothing from `_core`, so importing it here cannot form a cycle.
pub(crate) fn raise<'py>(
    py: Python<'py>,
    class: &str,
    message: &str,
    fields: &Bound<'py, PyDict>,
) -> PyErr {
    let build = || -> PyResult<Bound<'py, PyAny>> {
        py.import("llama_gpu.errors")?
            .getattr(class)?
            .call((message,), Some(fields))
    };
    match build() {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}
