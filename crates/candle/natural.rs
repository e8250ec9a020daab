//! The natural order of names: `h.2` before `h.10`. A `VarMap` has no order of its own.

use std::cmp::Ordering;

/// Compares part by part, runs of digits as numbers. The order is total: only equal names are equal.
pub fn compare(a: &str, b: &str) -> Ordering {
    parts(a).cmp(parts(b)).then_with(|| a.cmp(b))
}

/// Gives bytes and numbers, a number as its digits' count and digits. A number has the byte `0`, so that it sorts with
/// digits.
fn parts(name: &str) -> impl Iterator<Item = (u8, usize, &str)> {
    let mut rest = name;
    std::iter::from_fn(move || {
        let first = *rest.as_bytes().first()?;
        if !first.is_ascii_digit() {
            // A character of several bytes gives its first, and the bytes decide at last.
            rest = &rest[rest.chars().next().map_or(1, char::len_utf8)..];
            return Some((first, 0, ""));
        }
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at(digits);
        rest = after;
        let number = number.trim_start_matches('0');
        Some((b'0', number.len(), number))
    })
}

#[cfg(test)]
mod tests {
    use super::compare;

    #[test]
    fn numbers_count_as_numbers() {
        let ordered = [
            "embed",
            "h.1.b",
            "h.1.w",
            "h.01.w",
            "h.2.w",
            "h.10.w",
            "h.99999999999999999999.w",
            "h.a",
            "w",
            "é1",
            "é02",
        ];
        let mut sorted = ordered;
        sorted.reverse();
        sorted.sort_by(|a, b| compare(a, b));
        // Of equal numbers the bytes decide.
        assert_eq!(
            sorted,
            [
                "embed",
                "h.1.b",
                "h.01.w",
                "h.1.w",
                "h.2.w",
                "h.10.w",
                "h.99999999999999999999.w",
                "h.a",
                "w",
                "é1",
                "é02"
            ]
        );
    }
}
