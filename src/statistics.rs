#![doc = include_str!("statistics.md")]

use crate::{
    Record, Verdict,
    gsnr::{GsnrRecord, GsnrReport},
    write::{Entry, EntryTensor},
};

/// A number that is written of a tensor or of a step. A test holds its row in the documentation above to this.
pub(crate) struct Statistic<Of> {
    /// JSON's key, CSV's heading, the end of the gauge's name, TensorBoard's tag.
    pub name: &'static str,
    /// Prometheus' help text.
    pub meaning: &'static str,
    pub unit: &'static str,
    pub outputs: &'static [Output],
    /// Gives the value; `None` where it is unknown.
    pub of: Of,
}

pub(crate) type OfTensor = Statistic<fn(&EntryTensor<'_>) -> Option<Value>>;
pub(crate) type OfStep = Statistic<fn(&Entry) -> Option<Value>>;

/// The output of a statistic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Json,
    Csv,
    /// Gauges of Prometheus and scalars of TensorBoard.
    Scalars,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value {
    /// A count, or an index.
    Whole(Option<u64>),
    Number(Option<f64>),
    Flag(bool),
    Verdict(Option<Verdict>),
}

impl Value {
    /// Gives a number to draw over time and to compare in an alert.
    pub fn as_f64(self) -> Option<f64> {
        match self {
            #[expect(clippy::cast_precision_loss, reason = "a plan holds at most 2^40 elements")]
            Self::Whole(whole) => whole.map(|whole| whole as f64),
            Self::Number(number) => number,
            Self::Flag(flag) => Some(f64::from(u8::from(flag))),
            Self::Verdict(verdict) => verdict.map(|verdict| match verdict {
                Verdict::Healthy => 0.0,
                Verdict::Warning => 1.0,
                Verdict::Critical => 2.0,
            }),
        }
    }
}

/// Gives the statistics of a tensor in an output, in its order.
pub(crate) fn of_tensors(output: Output) -> impl Iterator<Item = &'static OfTensor> {
    let order = match output {
        Output::Json | Output::Csv => [COUNTS, NUMBERS, BESIDE],
        Output::Scalars => [NUMBERS, COUNTS, BESIDE],
    };
    order.into_iter().flatten().filter(move |statistic| statistic.outputs.contains(&output))
}

/// Gives the statistics of a step in the same way.
pub(crate) fn of_steps(output: Output) -> impl Iterator<Item = &'static OfStep> {
    STEP.iter().filter(move |statistic| statistic.outputs.contains(&output))
}

/// Whether a statistic of a step has this name.
pub(crate) fn is_of_steps(name: &str) -> bool {
    name == "step" || STEP.iter().any(|statistic| statistic.name == name)
}

/// Gives a statistic of a tensor by its name.
pub(crate) fn of_tensor(name: &str) -> &'static OfTensor {
    [COUNTS, NUMBERS, BESIDE].into_iter().flatten().find(|s| s.name == name).expect("the name of a statistic")
}

const EVERYWHERE: &[Output] = &[Output::Json, Output::Csv, Output::Scalars];
const TABLES: &[Output] = &[Output::Json, Output::Csv];
const SCALARS: &[Output] = &[Output::Scalars];

const ELEMENTS: &str = "elements";
const GRADIENT: &str = "gradient";
/// 0 to 1.
pub(crate) const SHARE: &str = "share";
const NONE: &str = "–";

const COUNTS: &[OfTensor] = &[
    row("count", "Elements, finite or not", ELEMENTS, TABLES, |t| count(t.report.record.count)),
    row("nan_count", "Elements that are NaN", ELEMENTS, EVERYWHERE, |t| count(t.report.record.nan_count)),
    row("inf_count", "Elements that are infinite", ELEMENTS, EVERYWHERE, |t| count(t.report.record.inf_count)),
    row("zero_count", "Elements that are 0", ELEMENTS, TABLES, |t| count(t.report.record.zero_count)),
    row("dead_count", "Elements below the dead threshold", ELEMENTS, TABLES, |t| count(t.report.record.dead_count)),
];

const NUMBERS: &[OfTensor] = &[
    row("l2_norm", "L2 norm, NaN or +Inf if an element is", GRADIENT, EVERYWHERE, |t| of(t, Record::l2_norm)),
    row("finite_l2_norm", "L2 norm of the finite elements", GRADIENT, EVERYWHERE, |t| of(t, Record::finite_l2_norm)),
    row("max_abs", "Largest finite magnitude", GRADIENT, EVERYWHERE, |t| of(t, |r| r.max_abs().map(f64::from))),
    row("min_nonzero_abs", "Smallest finite magnitude that is not 0", GRADIENT, EVERYWHERE, |t| {
        of(t, |r| r.min_nonzero_abs().map(f64::from))
    }),
    row("mean", "Mean of the finite elements", GRADIENT, EVERYWHERE, |t| of(t, Record::mean)),
    row("mean_abs", "Mean magnitude of the finite elements", GRADIENT, TABLES, |t| of(t, Record::mean_abs)),
    row("variance", "Variance of the finite elements", "gradient²", TABLES, |t| of(t, Record::variance)),
    row("std", "Standard deviation of the finite elements", GRADIENT, SCALARS, |t| of(t, Record::std)),
    row("zero_fraction", "Share of the elements that are 0", SHARE, SCALARS, |t| of(t, Record::zero_fraction)),
    row("dead_fraction", "Share of the elements below the dead threshold", SHARE, SCALARS, |t| {
        of(t, Record::dead_fraction)
    }),
];

/// Values beside the numbers of all elements.
const BESIDE: &[OfTensor] = &[
    row("first_nonfinite", "Smallest index of a NaN or Inf", "index", TABLES, |t| {
        Some(Value::Whole(t.report.record.first_nonfinite()))
    }),
    row("param_norm", "L2 norm of the weights", "weight", EVERYWHERE, |t| {
        t.report.param_norm.map(|norm| Value::Number(Some(norm)))
    }),
    row("ratio", "Norm of the gradient over that of the weights", "gradient / weight", EVERYWHERE, |t| {
        t.report.param_norm.map(|_| Value::Number(t.report.ratio()))
    }),
    row("update_norm", "L2 norm of what an optimizer subtracted from the weights", "weight", EVERYWHERE, |t| {
        t.report.update.map(|update| Value::Number(Some(update.update_norm())))
    }),
    row("update_ratio", "Norm of the update over that of the weights", NONE, EVERYWHERE, |t| {
        t.report.update.map(|update| Value::Number(update.ratio()))
    }),
    row("update_cosine", "Cosine of update and gradient", NONE, EVERYWHERE, |t| {
        t.report.update.map(|_| Value::Number(t.report.update_cosine()))
    }),
    row("update_lost_fraction", "Share of the elements whose update was lost in rounding", SHARE, EVERYWHERE, |t| {
        t.report.update.map(|update| Value::Number(update.lost_fraction()))
    }),
    row("moments_gsnr", "Signal over noise of the gradients, by AdamW's moments", NONE, EVERYWHERE, |t| {
        t.report.update.map(|_| Value::Number(t.report.moments))
    }),
    row("gsnr_mean", "Mean signal-to-noise ratio of the elements", NONE, &[Output::Csv, Output::Scalars], |t| {
        number(t.gsnr.and_then(GsnrRecord::mean))
    }),
    row("gsnr_median", "Median signal-to-noise ratio of the elements", NONE, &[Output::Csv, Output::Scalars], |t| {
        number(t.gsnr.and_then(GsnrRecord::median))
    }),
    row("verdict", "0 healthy, 1 warning, 2 critical", NONE, EVERYWHERE, |t| {
        t.verdict.map(|verdict| Value::Verdict(Some(verdict)))
    }),
];

const STEP: &[OfStep] = &[
    row("total_norm", "L2 norm of all gradients, NaN or +Inf if an element is", GRADIENT, EVERYWHERE, |e| {
        number(e.report().outputs().total_norm)
    }),
    row("finite_total_norm", "L2 norm of all finite elements", GRADIENT, EVERYWHERE, |e| {
        number(e.report().outputs().finite_total_norm)
    }),
    row("clip_coefficient", "What the clip multiplies the gradients by", NONE, EVERYWHERE, |e| {
        number(e.report().outputs().coefficient_f64)
    }),
    row("skip", "1 if the step is to be left out", NONE, &[Output::Json, Output::Scalars], |e| {
        Some(Value::Flag(e.report().skip()))
    }),
    row("nan_count", "Elements of all tensors that are NaN", ELEMENTS, SCALARS, |e| {
        count(e.report().outputs().nan_count)
    }),
    row("inf_count", "Elements of all tensors that are infinite", ELEMENTS, SCALARS, |e| {
        count(e.report().outputs().inf_count)
    }),
    row("noise_scale", "Noise scale in batches", "batches", &[Output::Json, Output::Scalars], |e| {
        number(e.gsnr().and_then(GsnrReport::noise_scale))
    }),
    row("verdict", "0 healthy, 1 warning, 2 critical", NONE, EVERYWHERE, |e| Some(Value::Verdict(e.verdict()))),
];

const fn row<Of: Copy>(
    name: &'static str,
    meaning: &'static str,
    unit: &'static str,
    outputs: &'static [Output],
    of: Of,
) -> Statistic<Of> {
    Statistic { name, meaning, unit, outputs, of }
}

fn count(count: u64) -> Option<Value> {
    Some(Value::Whole(Some(count)))
}

fn number(number: impl Into<Option<f64>>) -> Option<Value> {
    Some(Value::Number(number.into()))
}

fn of<N: Into<Option<f64>>>(tensor: &EntryTensor<'_>, statistic: fn(&Record) -> N) -> Option<Value> {
    number(statistic(tensor.report.record))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table<Of: 'static>(statistics: impl IntoIterator<Item = &'static Statistic<Of>>) -> String {
        let row = |s: &Statistic<Of>| {
            let outputs = s.outputs.iter().map(|output| format!("{output:?}").to_lowercase()).collect::<Vec<_>>();
            format!("| `{}` | {} | {} | {} |\n", s.name, s.meaning, s.unit, outputs.join(", "))
        };
        let rows: String = statistics.into_iter().map(row).collect();
        format!("\n| name | meaning | unit | in |\n|---|---|---|---|\n{rows}\n")
    }

    #[test]
    fn the_documentation_has_a_row_for_each() {
        for table in [table([COUNTS, NUMBERS, BESIDE].into_iter().flatten()), table(STEP)] {
            assert!(include_str!("statistics.md").contains(&table), "src/statistics.md should have{table}");
        }
    }
}
