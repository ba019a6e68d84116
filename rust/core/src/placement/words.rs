//! Sizes and lists as a person reads them.

/// `5.2 GiB`, `640 MiB`, `12 bytes`; rounded to the nearest.
pub(crate) fn size(bytes: u64) -> String {
    written(bytes, f64::round)
}

/// As [`size`], rounded up: for what must be there at the least.
pub(crate) fn size_at_least(bytes: u64) -> String {
    written(bytes, f64::ceil)
}

fn written(bytes: u64, rounded: fn(f64) -> f64) -> String {
    const MIB: f64 = 1_048_576.0;
    const GIB: f64 = 1_073_741_824.0;
    #[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
    let number = bytes as f64;
    let tenths_of_gib = rounded(number / GIB * 10.0);
    let mib = rounded(number / MIB);
    if mib >= 1024.0 {
        format!("{:.1} GiB", tenths_of_gib / 10.0)
    } else if mib >= 1.0 {
        format!("{mib} MiB")
    } else {
        format!("{bytes} bytes")
    }
}

/// `a`, `a and b`, `a, b and c`.
pub(crate) fn list(items: &[String], last: &str) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., end] => format!("{} {last} {end}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_to_what_a_person_reads() {
        assert_eq!(size(12), "12 bytes");
        assert_eq!(size(640 << 20), "640 MiB");
        assert_eq!(size((5 << 30) + (200 << 20)), "5.2 GiB");
        assert_eq!(size((1 << 30) - 1), "1.0 GiB");
    }

    #[test]
    fn what_must_be_there_is_never_understated() {
        assert_eq!(size_at_least((5 << 30) + 1), "5.1 GiB");
        assert_eq!(size_at_least(5 << 30), "5.0 GiB");
        assert_eq!(size_at_least((640 << 20) + 1), "641 MiB");
    }

    #[test]
    fn lists_end_with_a_word() {
        let items = ["a", "b", "c"].map(str::to_owned);
        assert_eq!(list(&items, "and"), "a, b and c");
        assert_eq!(list(&items[..2], "or"), "a or b");
        assert_eq!(list(&items[..1], "or"), "a");
        assert_eq!(list(&[], "or"), "");
    }
}
