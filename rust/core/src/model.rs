//! Facts about a model, derived once from its header.
