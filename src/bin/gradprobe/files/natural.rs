//! The natural order of names: `blocks.2` before `blocks.10`.

use std::cmp::Ordering;

/// Compares byte by byte, and runs of digits of any length as numbers. Bytes tell names apart that differ only in
/// leading zeros, so the order is total and only equal names are equal.
pub fn compare(a: &str, b: &str) -> Ordering {
    tokens(a).cmp(tokens(b)).then_with(|| a.cmp(b))
}

/// A byte, or a number as its count of digits and its digits. A number's first field is `0`, so that it sorts with
/// digits; no byte token is a digit.
type Token<'a> = (u8, usize, &'a [u8]);

fn tokens(name: &str) -> impl Iterator<Item = Token<'_>> {
    let mut rest = name.as_bytes();
    std::iter::from_fn(move || {
        let (&first, after) = rest.split_first()?;
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if digits == 0 {
            rest = after;
            return Some((first, 0, &[][..]));
        }
        let (number, after) = rest.split_at(digits);
        rest = after;
        let zeros = number.iter().take_while(|&&digit| digit == b'0').count();
        Some((b'0', digits - zeros, &number[zeros..]))
    })
}
