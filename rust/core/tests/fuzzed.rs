//! What the fuzz targets check, on a fixed number of inputs: a short run of what `make fuzz` does for longer.
#![allow(
    dead_code,
    missing_docs,
    clippy::pedantic,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[path = "../../fuzz/checks/mod.rs"]
mod checks;
#[path = "support/gguf_bytes.rs"]
mod gguf_bytes;

/// The same inputs every time, from short to long.
fn inputs(count: usize, longest: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut byte = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..count).map(move |number| (0..=number * longest / count).map(|_| byte()).collect())
}

#[test]
fn any_options_of_any_model_end_in_an_estimate_or_a_refusal() {
    inputs(1_000, 256).for_each(|input| checks::estimate_options::check(&input));
}

#[test]
fn any_gpus_and_models_end_in_a_decision_that_holds() {
    inputs(20_000, 400).for_each(|input| checks::place_never_overcommits::check(&input));
}

#[test]
fn any_changed_header_ends_in_a_header_or_a_refusal() {
    let headers = [(2, false), (2, true), (3, false), (3, true)]
        .map(|(version, big_endian)| gguf_bytes::sample(version, big_endian).file());
    for (number, changes) in inputs(20_000, 40).enumerate() {
        let mut bytes = headers[number % headers.len()].clone();
        for change in changes.chunks_exact(3) {
            let place = usize::from(change[0]) << 8 | usize::from(change[1]);
            let place = place % bytes.len();
            bytes[place] = change[2];
        }
        checks::parse_header::check(&bytes);
    }
}
