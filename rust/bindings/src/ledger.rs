//! `Ledger` and `Lease`.

use llama_gpu_core::placement::{BytesByPool, Claim, HOST, Lease, Ledger, Refused};
use pyo3::exceptions::{PyKeyError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::errors::raise;
use crate::question::Gpus;

#[pyclass(frozen, name = "Ledger", module = "llama_gpu")]
pub(crate) struct PyLedger(Ledger);

/// `DoesNotFitError` where too little is left, `KeyError` for a GPU the ledger does not know.
fn refused(py: Python<'_>, ledger: &Ledger, refusal: &Refused) -> PyErr {
    let message = refusal.to_string();
    match refusal {
        Refused::UnknownPool(_) => PyKeyError::new_err(message),
        Refused::AlreadyReleased => PyRuntimeError::new_err(message),
        Refused::TooLittle {
            asked_bytes,
            available_bytes,
            ..
        } => {
            let short_by_bytes = asked_bytes.saturating_sub(*available_bytes);
            let fields = PyDict::new(py);
            let filled = fields
                .set_item("required_bytes", asked_bytes)
                .and_then(|()| fields.set_item("short_by_bytes", short_by_bytes))
                .and_then(|()| fields.set_item("free_bytes_by_gpu", ledger.available()));
            match filled {
                Ok(()) => raise(py, "DoesNotFitError", &message, &fields),
                Err(failure) => failure,
            }
        }
    }
}

#[pymethods]
impl PyLedger {
    #[new]
    #[pyo3(signature = (gpus, *, host_bytes=None))]
    fn new(gpus: &Bound<'_, PyAny>, host_bytes: Option<u64>) -> PyResult<Self> {
        let gpus = Gpus::from_any(gpus)?;
        let gpus = gpus.as_refs();
        let budgets = gpus
            .iter()
            .map(|gpu| (gpu.uuid.clone(), gpu.free_bytes.unwrap_or(0)));
        let host = host_bytes.map(|bytes| (HOST.to_owned(), bytes));
        Ok(Self(Ledger::new(budgets.chain(host))))
    }

    fn reserve(&self, py: Python<'_>, owner: &str, bytes_by_gpu: BytesByPool) -> PyResult<PyLease> {
        let lease = self
            .0
            .reserve(owner, bytes_by_gpu)
            .map_err(|e| refused(py, &self.0, &e))?;
        Ok(PyLease {
            ledger: self.0.clone(),
            lease,
        })
    }

    fn set_budget(&self, gpu: &str, bytes: u64) {
        self.0.set_budget(gpu, bytes);
    }

    fn release_owner(&self, owner: &str) -> usize {
        self.0.release_owner(owner)
    }

    #[getter]
    fn available_by_gpu(&self) -> BytesByPool {
        self.0.available()
    }

    #[getter]
    fn claims<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.claims().into_iter().map(PyClaim))
    }

    fn __repr__(&self) -> String {
        let claims = self.0.claims().len();
        format!(
            "<Ledger available_by_gpu={:?} claims={claims}>",
            self.0.available()
        )
    }
}

#[pyclass(frozen, eq, name = "Claim", module = "llama_gpu")]
#[derive(PartialEq, Eq)]
pub(crate) struct PyClaim(Claim);

#[pymethods]
impl PyClaim {
    #[getter]
    fn owner(&self) -> &str {
        &self.0.owner
    }

    #[getter]
    fn bytes_by_gpu(&self) -> BytesByPool {
        self.0.bytes.clone()
    }

    #[getter]
    fn state(&self) -> &'static str {
        self.0.state.name()
    }

    fn __repr__(&self) -> String {
        format!(
            "<Claim of {:?} {} {:?}>",
            self.owner(),
            self.state(),
            self.0.bytes
        )
    }
}

#[pyclass(frozen, name = "Lease", module = "llama_gpu")]
pub(crate) struct PyLease {
    ledger: Ledger,
    lease: Lease,
}

#[pymethods]
impl PyLease {
    #[getter]
    fn owner(&self) -> &str {
        self.lease.owner()
    }

    #[getter]
    fn bytes_by_gpu(&self) -> BytesByPool {
        self.lease.bytes()
    }

    #[getter]
    fn state(&self) -> &'static str {
        self.lease.state().name()
    }

    fn commit(&self, py: Python<'_>, bytes_by_gpu: BytesByPool) -> PyResult<()> {
        self.lease
            .commit(bytes_by_gpu)
            .map_err(|error| refused(py, &self.ledger, &error))
    }

    fn release(&self) -> bool {
        self.lease.release()
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyTuple>) {
        self.lease.release();
    }

    fn __repr__(&self) -> String {
        format!(
            "<Lease of {:?} {} {:?}>",
            self.owner(),
            self.state(),
            self.lease.bytes()
        )
    }
}
