//! Compares two steps' gradients, tensor by tensor; or the norms of two runs.

use crate::{
    device::Open,
    files::{Entry, Failure, Lent, OtherTypes, TensorFile, is_run},
    run::{Number, Run},
    terminal::{one_line, print},
};
use clap::Args;
use gradprobe::{
    Config, HostTensor, Plan, Tensor,
    dot::{Dot, DotReport},
    health::{Compared, Comparison, NormSummary, RunSummary},
    write::json_number,
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    fmt::Write,
    path::{Path, PathBuf},
};

/// Compare two files of gradients, tensor by tensor, or two runs
///
/// Norms, their ratio, the cosine and the norm of the difference, over the elements that are finite in both; the largest differences
/// first.
///
/// Each is a safetensors file, a folder or an index of shards, or a file of PyTorch's (.pt, .pth, .bin). Tensors are matched by
/// name; the types of their elements may differ.
///
/// Of two runs, each a folder with steps.jsonl or such a file, the norms are compared: means, deviations, and which tensors rose or fell
/// tenfold.
#[derive(Debug, Args)]
pub struct Options {
    /// First file or run
    #[arg(value_name = "A")]
    a: PathBuf,

    /// Second file or run
    #[arg(value_name = "B")]
    b: PathBuf,

    /// Show N tensors [default: 40; all in JSON]
    #[arg(long, value_name = "N")]
    top: Option<usize>,

    /// Print the comparison as JSON
    #[arg(long)]
    json: bool,
}

/// Lines of a table without `--top`.
const SCREEN: usize = 40;

/// Compares the files, on a probe made by `open_probe`.
pub fn run(options: &Options, open_probe: Open<'_>) -> Result<(), Failure> {
    match [&options.a, &options.b].map(|path| is_run(path)) {
        [true, true] => return compare_runs(options),
        [false, false] => {}
        [of_a, _] => {
            let (run, file) = if of_a { (&options.a, &options.b) } else { (&options.b, &options.a) };
            let reason = format!("is a run, and {} a file of gradients", file.display());
            return Err(Failure::file(run, reason));
        }
    }
    let [a, b] = [&options.a, &options.b].map(|path| TensorFile::open(path, |_| true, OtherTypes::LeftOut));
    let (a, b) = (a?, b?);
    let of_b: HashMap<&str, usize> = b.entries.iter().enumerate().map(|(t, entry)| (entry.name.as_str(), t)).collect();
    let mut pairs = Vec::new();
    let mut only_a = Vec::new();
    for (index, entry) in a.entries.iter().enumerate() {
        let Some(&other) = of_b.get(entry.name.as_str()) else {
            only_a.push(entry.name.as_str());
            continue;
        };
        let (here, there) = (entry.len, b.entries[other].len);
        if here != there {
            let reason = format!("{there} elements here, {here} in {}: of two models", a.path.display());
            return Err(Failure::tensor(&b.path, &entry.name, reason));
        }
        pairs.push((index, other));
    }
    if pairs.is_empty() {
        let reason = format!("no tensor has the name of one in {}: of two models", a.path.display());
        return Err(Failure::file(&b.path, reason));
    }
    let common: HashMap<usize, usize> = pairs.iter().map(|&(a, b)| (b, a)).collect();
    let only_b = b.entries.iter().enumerate().filter(|(index, _)| !common.contains_key(index));
    let only_b: Vec<&str> = only_b.map(|(_, entry)| entry.name.as_str()).collect();

    let entries: Vec<&Entry> = pairs.iter().map(|&(index, _)| &a.entries[index]).collect();
    let plan = Plan::new(entries.iter().map(|entry| (entry.name.as_str(), entry.dtype, entry.len)))?;
    let tensors: Result<Vec<(Lent, Lent)>, Failure> =
        pairs.iter().map(|&(of_a, of_b)| Ok((a.tensor(of_a)?, b.tensor(of_b)?))).collect();
    let (of_a, of_b): (Vec<Lent>, Vec<Lent>) = tensors?.into_iter().unzip();
    let [of_a, of_b]: [Vec<HostTensor>; 2] = [&of_a, &of_b].map(|tensors| tensors.iter().map(Lent::view).collect());
    let [of_a, of_b]: [Vec<&dyn Tensor>; 2] =
        [&of_a, &of_b].map(|tensors| tensors.iter().map(|tensor| tensor as _).collect());
    let mut probe = open_probe(plan, Config::new().dot())?;
    let report = probe.dot()?.measure(&of_a, &of_b)?;

    let only = [(&a, only_a), (&b, only_b)];
    if options.json {
        print(&format!("{}\n", as_json(&report, &only, options.top)))
    } else {
        print(&as_text(&report, &only, options.top.unwrap_or(SCREEN)))
    }
}

/// Compares the norms of two runs.
fn compare_runs(options: &Options) -> Result<(), Failure> {
    let [a, b] = [&options.a, &options.b].map(|path| summary(path));
    let (a, b) = (a?, b?);
    let comparison = Comparison::new(&a, &b);
    if comparison.lines.len() == 1 && a.tensors().len() + b.tensors().len() > 0 {
        let reason = format!("no tensor has the name of one in {}: of two models", options.a.display());
        return Err(Failure::file(&options.b, reason));
    }
    if !options.json {
        return print(&comparison.to_string());
    }
    let number = |x: f64| serde_json::to_value(json_number(x)).expect("a number or a string");
    let norm = |norm: &NormSummary| json!({"steps": norm.steps, "mean": number(norm.mean), "std": number(norm.std)});
    let line = |line: &Compared| json!({"tensor": line.tensor, "a": norm(&line.before), "b": norm(&line.after), "change": line.change.name()});
    let report = json!({
        "lines": comparison.lines.iter().map(line).collect::<Vec<_>>(),
        "left_out": [comparison.left_out.0, comparison.left_out.1],
        "unmatched": comparison.unmatched,
    });
    print(&format!("{report}\n"))
}

fn summary(path: &Path) -> Result<RunSummary, Failure> {
    let mut run = Run::open(path)?;
    let mut summary = RunSummary::default();
    while let Some(step) = run.next()? {
        let value = |norm: Option<Number>| norm.map_or(f64::NAN, |Number(norm)| norm);
        let total = value(step.total_norm);
        let tensors = step.tensors.unwrap_or_default();
        let norms = tensors.iter().filter(|tensor| !tensor.absent);
        let norms = norms.map(|tensor| (&*tensor.name, value(tensor.l2_norm)));
        summary.add(total.is_finite() && !step.skip, total, norms);
    }
    if summary.total.steps + summary.left_out == 0 {
        return Err(Failure::file(path, "has no step that is whole"));
    }
    Ok(summary)
}

/// Gives ‖b − a‖, from the sums. For tensors that are almost alike it has the rounding of their squares: 1e-6 of the
/// norms.
fn difference(dot: &Dot) -> f64 {
    (dot.a_squares - 2.0 * dot.dot + dot.b_squares).max(0.0).sqrt()
}

/// Gives that over the norms; 0 for two that are 0.
fn relative_difference(dot: &Dot) -> f64 {
    let norms = (dot.a_squares + dot.b_squares).sqrt();
    if norms > 0.0 { difference(dot) / norms } else { 0.0 }
}

fn ratio(dot: &Dot) -> Option<f64> {
    (dot.a_norm() > 0.0).then(|| dot.b_norm() / dot.a_norm())
}

/// Gives the tensors, those that differ most first: by elements that are not finite, then by the difference over the
/// norms.
fn sorted(report: &DotReport) -> Vec<(&str, &Dot)> {
    let mut tensors: Vec<(&str, &Dot)> = report.tensors().collect();
    tensors.sort_by(|(_, a), (_, b)| {
        let by_difference = || relative_difference(b).total_cmp(&relative_difference(a));
        (b.nonfinite_count > 0).cmp(&(a.nonfinite_count > 0)).then_with(by_difference)
    });
    tensors
}

/// Tensors that one of the files has alone.
type Only<'a> = [(&'a TensorFile, Vec<&'a str>); 2];

fn as_text(report: &DotReport, only: &Only<'_>, top: usize) -> String {
    let tensors = sorted(report);
    let total = report.total();
    let rows: Vec<(String, &Dot)> = tensors.iter().take(top).map(|&(name, dot)| (one_line(name), dot)).collect();
    let total = [("all tensors".to_owned(), &total)];
    let width = rows.iter().chain(&total).map(|(name, _)| name.chars().count()).max().unwrap_or(0).min(u16::MAX.into());
    let optional = |x: Option<f64>, places| x.map_or_else(|| "–".to_owned(), |x| format!("{x:.places$}"));
    let mut text = String::new();
    for (name, (file, _)) in ["A", "B"].iter().zip(only) {
        let _ = writeln!(text, "{name}: {}", one_line(&file.path.display().to_string()));
    }
    let _ = writeln!(
        text,
        "{:width$} {:>12} {:>10} {:>10} {:>10} {:>8} {:>10}",
        "tensor", "elements", "norm A", "norm B", "B / A", "cosine", "|B − A|"
    );
    for (name, dot) in rows.iter().chain(&total) {
        let _ = write!(
            text,
            "{name:width$} {:>12} {:>10.3e} {:>10.3e} {:>10} {:>8} {:>10.3e}",
            dot.count,
            dot.a_norm(),
            dot.b_norm(),
            ratio(dot).map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.3e}")),
            optional(dot.cosine(), 4),
            difference(dot)
        );
        if dot.nonfinite_count > 0 {
            let _ = write!(text, "  ◄ {} not finite in A or B, left out", dot.nonfinite_count);
        }
        text.push('\n');
    }
    if rows.len() < tensors.len() {
        let _ = writeln!(text, "{} of {} tensors, the largest differences first", rows.len(), tensors.len());
    }
    for (which, (file, names)) in ["A", "B"].iter().zip(only) {
        if !names.is_empty() {
            let _ = writeln!(text, "only in {which}: {}", one_line(&names.join(", ")));
        }
        let left_out: Vec<String> = file.left_out.iter().map(|t| format!("{} ({})", t.name, t.dtype)).collect();
        if !left_out.is_empty() {
            let _ = writeln!(text, "left out of {which}: {}", one_line(&left_out.join(", ")));
        }
    }
    text
}

fn as_json(report: &DotReport, only: &Only<'_>, top: Option<usize>) -> Value {
    let number = |x: f64| serde_json::to_value(json_number(x)).expect("a number or a string");
    let numbers = |dot: &Dot| {
        json!({
            "count": dot.count,
            "nonfinite_count": dot.nonfinite_count,
            "norm_a": number(dot.a_norm()),
            "norm_b": number(dot.b_norm()),
            "ratio": ratio(dot).map(number),
            "cosine": dot.cosine().map(number),
            "difference": number(difference(dot)),
        })
    };
    let named = |(name, dot): (&str, &Dot)| {
        let mut tensor = json!({"name": name});
        if let (Some(tensor), Value::Object(numbers)) = (tensor.as_object_mut(), numbers(dot)) {
            tensor.extend(numbers);
        }
        tensor
    };
    let [(a, only_a), (b, only_b)] = only;
    json!({
        "a": a.path.to_string_lossy(),
        "b": b.path.to_string_lossy(),
        "total": numbers(&report.total()),
        "tensors": sorted(report).into_iter().take(top.unwrap_or(usize::MAX)).map(named).collect::<Vec<_>>(),
        "only_in_a": only_a,
        "only_in_b": only_b,
    })
}
