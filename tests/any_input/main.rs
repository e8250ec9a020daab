//! Whatever comes in, nothing panics: calls in any order with any tensors and numbers, states from anywhere, files of any
//! bytes. Run by `cargo test` these are some seconds of chance; CONTRIBUTING.md says how a fuzzer looks for longer. What has
//! been found has a test of its own in `found.rs`.
#![allow(unsafe_code, reason = "names memory by its address")]
#![allow(clippy::cast_possible_truncation, reason = "any number will do")]

mod calls;
mod config;
mod found;
mod ranks;
mod readers;
mod states;

// Of the program, for its files.
#[path = "../../src/bin/gradprobe/failure.rs"]
#[allow(dead_code, reason = "of which the reader of headers needs a part")]
mod failure;
#[path = "../../src/bin/gradprobe/files/header.rs"]
#[allow(dead_code, reason = "of which the file and the type of an entry are the program's to know")]
mod header;
#[path = "../../src/bin/gradprobe/files/natural.rs"]
mod natural;

use arbitrary::{Arbitrary, Unstructured};
use std::time::Duration;

/// Gives a test inputs made of chance, or of what a fuzzer has thought of.
macro_rules! for_any {
    ($input:ty, $test:expr) => {
        bolero::check!().with_max_len(1024).with_iterations(usize::MAX).with_test_time($crate::SECONDS).for_each(
            |bytes: &[u8]| {
                let bytes = $crate::lengthened(bytes);
                let mut bytes = arbitrary::Unstructured::new(&bytes);
                if let Ok(input) = <$input as arbitrary::Arbitrary>::arbitrary(&mut bytes) {
                    $test(input);
                }
            },
        )
    };
}
use for_any;

/// These bytes, and more by chance, the same each time: most inputs are short, and at their end all would be 0.
fn lengthened(bytes: &[u8]) -> Vec<u8> {
    let seed = bytes.iter().fold(0u64, |seed, &byte| seed.wrapping_mul(257) ^ u64::from(byte));
    let mut random = fastrand::Rng::with_seed(seed);
    bytes.iter().copied().chain(std::iter::repeat_with(|| random.u8(..)).take(2048)).collect()
}

/// For each test. The tests run side by side.
const SECONDS: Duration = Duration::from_secs(5);

/// A number that options may be given: most of the time the usual one, then one that is no nonsense, then any.
#[derive(Clone, Copy, Debug)]
struct Number(Option<f64>);

impl<'a> Arbitrary<'a> for Number {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        const SOME: [f64; 10] = [0.0, 1e-6, 0.01, 0.5, 0.9, 1.0, 1.05, 2.0, 50.0, 1e4];
        Ok(Self(match bytes.int_in_range(0..=39)? {
            0..30 => None,
            30..37 => Some(*bytes.choose(&SOME)?),
            37 => Some(-f64::arbitrary(bytes)?),
            38 => Some(f64::from(f32::arbitrary(bytes)?)),
            _ => Some(f64::arbitrary(bytes)?),
        }))
    }
}

impl Number {
    fn or(self, usual: f64) -> f64 {
        self.0.unwrap_or(usual)
    }
}

/// What is given in one of eight cases.
#[derive(Clone, Copy, Debug)]
struct Rare<T>(Option<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Rare<T> {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(Self(if bytes.ratio(1, 8)? { Some(T::arbitrary(bytes)?) } else { None }))
    }
}

/// At most so many, each number of them as often.
#[derive(Clone, Debug)]
struct Many<T, const MOST: usize>(Vec<T>);

impl<'a, T: Arbitrary<'a>, const MOST: usize> Arbitrary<'a> for Many<T, MOST> {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let count = bytes.int_in_range(0..=MOST)?;
        (0..count).map(|_| T::arbitrary(bytes)).collect::<arbitrary::Result<_>>().map(Self)
    }
}
