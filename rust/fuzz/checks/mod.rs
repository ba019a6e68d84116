//! What the fuzz targets check; the core's tests run the same on a fixed number of inputs.

pub(crate) mod estimate_options;
mod numbers;
pub(crate) mod parse_header;
pub(crate) mod place_never_overcommits;
