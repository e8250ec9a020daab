//! Remedies by kind and cause, as the literature on gradient monitoring gives them, most promising first.

use super::FindingKind;

/// Gives the remedies for a finding of this kind by this rule, most promising first, and for the cause where the rule
/// tells it.
pub(super) fn advice_for(kind: FindingKind, rule: &str) -> &'static [&'static str] {
    match (kind, rule) {
        (FindingKind::Exploding, "gain") => &[INITIALISE, LOWER_RATE, WARM_UP, "decay the weights"],
        (FindingKind::Vanishing, "gain") => &[INITIALISE, "add a normalisation"],
        (FindingKind::Exploding, "max_abs") => &[
            "leave the step out",
            "one element of one tensor: test the memory of that machine, and look at the batch by its tag",
            LOWER_RATE,
            CLIP,
        ],
        (FindingKind::Vanishing, "silent") => &[
            "check that the loss depends on the parameters: no detach, no constant, nothing masked out whole",
            LOSS_SCALE,
            "use Leaky ReLU, GELU or SiLU in place of ReLU",
        ],
        (FindingKind::Dead, "inactive_rows") => &["check the indices: those of a table are the same few in every step"],
        _ => advice(kind),
    }
}

/// Gives the remedies for a kind of finding, most promising first.
pub const fn advice(kind: FindingKind) -> &'static [&'static str] {
    match kind {
        FindingKind::Nan => &[
            LOWER_RATE,
            "look at the operation between the frontier's tensor and the last clean one: a division by 0, the log or root of 0",
            CLIP,
            "check the batch for bad data",
            LOSS_SCALE,
        ],
        FindingKind::Inf => {
            &[LOSS_SCALE, LOWER_RATE, CLIP, "compute the overflowing part in f32, or all of it in bf16"]
        }
        FindingKind::Vanishing => &[
            "use ReLU, GELU or SiLU in place of sigmoid and tanh",
            "add residual connections",
            "add a normalisation, before the layer rather than after it",
            INITIALISE,
            "raise the learning rate, or warm it up for less long",
        ],
        FindingKind::Exploding => &[CLIP, LOWER_RATE, WARM_UP, INITIALISE, "add a normalisation"],
        FindingKind::Dead => &[
            "use Leaky ReLU, GELU or SiLU in place of ReLU",
            LOWER_RATE,
            "initialise again the layers whose units are dead, with small positive biases",
            LOSS_SCALE,
        ],
        FindingKind::Zeros => &[
            "check that the tensor takes part in the loss and is not frozen or detached",
            "use Leaky ReLU, GELU or SiLU in place of ReLU",
            LOSS_SCALE,
        ],
        FindingKind::Ratio => &[
            "too large beside its weight: lower the learning rate; too small: raise it, or give the layer its own",
            WARM_UP,
            INITIALISE,
        ],
        FindingKind::Spread => &[
            "give the layers learning rates of their own, or use an optimizer that does, such as Adam or LAMB",
            INITIALISE,
            "add a normalisation",
        ],
        FindingKind::Flow => &[
            "add residual connections",
            "add a normalisation, before the layer rather than after it",
            INITIALISE,
            "use ReLU, GELU or SiLU in place of sigmoid and tanh",
        ],
        FindingKind::Spike => &[
            "look at the batch by its tag: outliers, broken samples, wrong labels",
            CLIP,
            LOWER_RATE,
            "leave the step out",
        ],
        FindingKind::Unstable => &[LOWER_RATE, CLIP, WARM_UP, LARGER_BATCH],
        FindingKind::Noisy => &[LARGER_BATCH, "lower the learning rate or decay it", "raise the optimizer's momentum"],
        FindingKind::Underflow => &[LOSS_SCALE, "keep this tensor's gradient in bf16 or f32"],
        FindingKind::Clipped => &[
            "raise the clip to about the 95th or 99th percentile of the unclipped norms",
            "lower the learning rate in place of a tight clip, which acts as a cut of it",
            "clip by a percentile or z-score of the last norms (`Clip`)",
        ],
        FindingKind::UpdateTooLarge => &[
            LOWER_RATE,
            WARM_UP,
            CLIP,
            "give the layer a smaller rate (`optim::Group`)",
            "keep weights in bf16 or f32 where those of f16 go beyond 65504",
        ],
        FindingKind::UpdateLost => &[
            "raise the learning rate, or that of the layer (`optim::Group`)",
            "keep the weights smaller: by weight decay, or from the initialisation on",
        ],
        FindingKind::Stalled => &[
            "look for what is vanishing between this tensor and the loss",
            "give the layer a larger rate (`optim::Group`), or use AdamW, which gives each element a step of its own",
            "under AdamW, lower ε where the gradients are near it",
        ],
        FindingKind::RanksDiffer => &[
            "stop, and go on from the last checkpoint whose weights are the same on all ranks",
            "one bit of one tensor, once: test that GPU's memory, and take it out if it comes again",
            "many tensors of one rank: it has missed an all-reduce, or its random numbers, data order or kernels are others",
            "skip such steps: `ReplicaCheck::Strict`",
        ],
    }
}

const LOWER_RATE: &str = "lower the learning rate";
const CLIP: &str = "clip the global norm: 1.0 for transformers, 5.0 for recurrent networks, 0.5 if it still explodes";
const WARM_UP: &str = "warm the learning rate up for longer";
const INITIALISE: &str =
    "check the initialisation: He for ReLU, Xavier for tanh, scaled down with depth on residual paths";
const LOSS_SCALE: &str = "in mixed precision, adapt the loss scale: lower on overflow, higher when gradients become 0";
const LARGER_BATCH: &str = "raise the batch size or accumulate more micro-batches";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guide_has_a_row_for_each() {
        let guide = include_str!("../guide/findings.md");
        for kind in FindingKind::ALL {
            let row = guide.lines().find(|line| line.starts_with(&format!("| `{kind}` | ")));
            let end = format!(" | {} |", advice(kind).join("; "));
            assert!(row.is_some_and(|row| row.ends_with(&end)), "src/guide/findings.md: {kind} should end with{end}");
        }
    }
}
