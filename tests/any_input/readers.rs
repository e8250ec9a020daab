//! Files and texts of any bytes.

use crate::{Many, Rare, for_any, header};
use arbitrary::Arbitrary;
use gradprobe::{
    Config, Cpu, DType, Error, Plan, Probe, Report,
    health::{Baseline, Health, Rules},
};
use std::path::Path;

#[derive(Arbitrary, Debug)]
struct AnyHeader<'a> {
    /// What stands for the length of the header: as long as it is, or this.
    length: Rare<u64>,
    pieces: Many<u8, 30>,
    any: &'a [u8],
    behind: u8,
}

/// Of which headers are made, so that some are nearly right.
const PIECES: [&str; 22] = [
    "{",
    "}",
    "\"a\":",
    "\"b\":",
    "\"__metadata__\":",
    "\"dtype\":",
    "\"F32\"",
    "\"BF16\"",
    "\"F4\"",
    "\"shape\":",
    "[",
    "]",
    "\"data_offsets\":",
    ",",
    "0",
    "8",
    "18446744073709551615",
    "-1",
    "1e999",
    "null",
    "{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
];

/// What the inspector reads of a file: entries that lie within it, or why not.
#[test]
fn any_header_of_a_safetensors_file_is_read_or_refused() {
    for_any!(AnyHeader, |input: AnyHeader| {
        let mut header: Vec<u8> =
            input.pieces.0.iter().flat_map(|&piece| PIECES[piece as usize % PIECES.len()].bytes()).collect();
        header.extend_from_slice(input.any);
        let length = input.length.0.unwrap_or(header.len() as u64);
        let file = [&length.to_le_bytes()[..], &header, &vec![0; input.behind as usize]].concat();
        let size = file.len() as u64;
        for others in [header::OtherTypes::Refused, header::OtherTypes::LeftOut] {
            match header::read(Path::new("any"), &mut &file[..], size, |name| name != "b", others) {
                Ok((entries, left_out)) => {
                    for entry in entries {
                        assert_eq!(entry.shape.iter().product::<u64>(), entry.len);
                        assert!(entry.start <= entry.end() && entry.end() <= size, "{entry:?}");
                    }
                    assert!(others == header::OtherTypes::LeftOut || left_out.is_empty());
                }
                Err(failure) => assert!(failure.to_string().starts_with("any: ")),
            }
        }
    });
}

/// The report of a step of two tensors.
fn report() -> Report {
    let plan = Plan::new([("a\t", DType::F32, 2), ("b", DType::F32, 1)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new()).unwrap();
    probe.measure(&[&[1.0f32, 2.0], &[3.0f32]]).unwrap();
    probe.wait().unwrap()
}

#[derive(Arbitrary, Debug)]
struct AnyBaseline<'a> {
    pieces: Many<u8, 30>,
    any: &'a str,
}

const LINES: [&str; 12] = [
    "gradprobe baseline 2\n",
    "-\n7\t2e0\t3e0\n",
    "2\t7\t1e-3\t1e3\ta\\t\n",
    "1\t18446744073709551615\t1\t0\tb\n",
    "1e-3\n0\t0\t0\n",
    "18446744073709551615\t1\t1\n",
    "\t",
    "\n",
    "NaN",
    "-0",
    "\\",
    "1\t0\t0\t0\tb\n",
];

/// A baseline that can be read is written as it was, and a step of its model is judged by it.
#[test]
fn any_text_is_a_baseline_or_refused() {
    let report = report();
    for_any!(AnyBaseline, |input: AnyBaseline| {
        let mut text: String = input.pieces.0.iter().map(|&piece| LINES[piece as usize % LINES.len()]).collect();
        text.push_str(input.any);
        match text.parse::<Baseline>() {
            Ok(baseline) => {
                assert_eq!(baseline.to_string().parse(), Ok(baseline.clone()), "{text:?}");
                if let Ok(mut health) = Health::new(report.plan(), Rules::default().baseline(baseline)) {
                    health.diagnose(&report).unwrap();
                }
            }
            Err(error) => assert!(matches!(error, Error::InvalidConfig { option: "baseline", .. }), "{error}"),
        }
    });
}

/// Files that are there already are continued at the end of an entry, refuse the step, or are left as they are.
#[cfg(all(feature = "json", feature = "csv"))]
#[test]
fn any_file_is_continued_or_left_as_it_is() {
    use gradprobe::write::{Csv, Entry, JsonLines, Sink};

    let entry = Entry::new(report());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("steps");
    let open = |is_csv: bool| -> Result<Box<dyn Sink>, Error> {
        Ok(if is_csv { Box::new(Csv::open(&path)?) } else { Box::new(JsonLines::open(&path)?) })
    };
    let [headings, nothing] = [true, false].map(|is_csv| {
        std::fs::write(&path, "").unwrap();
        open(is_csv).unwrap();
        std::fs::read(&path).unwrap()
    });
    let entries = [(true, &headings), (false, &nothing)].map(|(is_csv, empty)| {
        std::fs::write(&path, "").unwrap();
        open(is_csv).unwrap().write(&entry).unwrap();
        std::fs::read(&path).unwrap()[empty.len()..].to_vec()
    });
    for_any!((bool, u8, u16, &[u8]), |(is_csv, cut, more, any): (bool, u8, u16, &[u8])| {
        let mut before = if is_csv { headings.clone() } else { b"{".to_vec() };
        before.truncate(if cut > 128 { usize::from(cut) } else { before.len() });
        before.extend_from_slice(any);
        before.extend(std::iter::repeat_n(b'x', (more % 5000).into()));
        std::fs::write(&path, &before).unwrap();
        let written = open(is_csv).map(|mut sink| sink.write(&entry));
        let after = std::fs::read(&path).unwrap();
        match written {
            Ok(Ok(())) => {
                let kept = after.strip_suffix(&*entries[usize::from(!is_csv)]).expect("the entry is whole");
                assert!(before.starts_with(kept) || is_csv && kept == headings);
                assert!(kept.is_empty() || kept.ends_with(b"\n"));
            }
            Ok(Err(Error::StepWritten { .. })) => assert!(before.starts_with(&after) && after.ends_with(b"\n")),
            Ok(Err(other)) => panic!("{other}"),
            Err(_) => assert!(after == before),
        }
    });
}
