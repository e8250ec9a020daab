//! Whether ranks mean the same: placements that are possible, and hashes of what must be equal on all ranks, compared
//! before anything is merged.

use super::Placement;
use crate::{Config, Error, Plan, features::Features};

/// Whether a plan's tensors can be placed so on this many ranks.
///
/// # Errors
/// [`Error::TensorCount`], [`Error::Placement`], and [`Error::InvalidConfig`] for a clip that needs more than records.
pub(crate) fn checked(plan: &Plan, config: &Config, placements: &[Placement], ranks: u32) -> Result<(), Error> {
    let (planned, given) = (plan.tensors().len(), placements.len());
    if planned != given {
        return Err(Error::TensorCount { planned, given });
    }
    if config.clip.needs_histogram() {
        let (expected, value) = ("one that does not look at the elements of other ranks", format!("{:?}", config.clip));
        return Err(Error::InvalidConfig { option: "clip", expected, value });
    }
    for (placement, spec) in placements.iter().zip(plan.tensors()) {
        let Placement::Ranks(of) = placement else { continue };
        let twice = of.iter().enumerate().find(|(place, rank)| of[..*place].contains(rank));
        let what = match (of.iter().find(|&&rank| rank >= ranks), twice) {
            _ if of.is_empty() => "no rank".to_owned(),
            (Some(rank), _) => format!("rank {rank} of {ranks}"),
            (None, Some((_, rank))) => format!("rank {rank} twice"),
            (None, None) => continue,
        };
        return Err(Error::Placement { name: spec.name.clone(), what });
    }
    Ok(())
}

/// FNV-1a: the same on every machine and in every version.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What a rank's tensor must have in common with that of the other ranks.
fn description(plan: &Plan, placements: &[Placement], index: usize) -> String {
    let spec = &plan.tensors()[index];
    let length = match placements[index] {
        Placement::Replicated => format!("{} elements of ", spec.len),
        _ => String::new(),
    };
    let weight = plan.weights().map_or(String::new(), |weights| format!(", weights of {}", weights[index]));
    format!("{:?}: {length}{}{weight}, {:?}", spec.name, spec.dtype, placements[index])
}

/// Compares what must be equal with the other ranks. `all_gather` is theirs, of the same number of words on each.
///
/// # Errors
/// [`Error::RankDiffers`] on every rank when one of them differs from rank 0, and those of `all_gather`.
pub(crate) fn agree(
    plan: &Plan,
    config: &Config,
    placements: &[Placement],
    mut all_gather: impl FnMut(&[u64]) -> Result<Vec<u64>, Error>,
) -> Result<(), Error> {
    let tensors = plan.tensors().len();
    let Config { dead_threshold, clip, non_finite, features: Features { loss_scale, .. }, .. } = config;
    let of_step = format!(
        "dead_threshold: {dead_threshold:?}, clip: {clip:?}, non_finite: {non_finite:?}, loss_scale: {loss_scale:?}, \
         weights: {}",
        plan.weights().is_some()
    );
    let settings = hash(&of_step);
    let heads = all_gather(&[tensors as u64, settings, hash(env!("CARGO_PKG_VERSION"))])?;
    for (rank, head) in (0..).zip(heads.chunks_exact(3)) {
        let what = if head[0] != heads[0] {
            format!("{} tensors are planned, on rank 0 there are {}", head[0], heads[0])
        } else if head[1] != heads[1] {
            format!("settings are others than on rank 0; here they are {of_step}")
        } else if head[2] != heads[2] {
            "the version of gradprobe is another than on rank 0".to_owned()
        } else {
            continue;
        };
        return Err(Error::RankDiffers { rank, what });
    }
    if tensors == 0 {
        return Ok(());
    }
    let own: Vec<u64> = (0..tensors).map(|index| hash(&description(plan, placements, index))).collect();
    let all = all_gather(&own)?;
    for (rank, of_rank) in (0..).zip(all.chunks_exact(tensors)) {
        if let Some(index) = (0..tensors).find(|&index| of_rank[index] != all[index]) {
            let here = description(plan, placements, index);
            let what = format!("tensor {index} is planned otherwise than on rank 0; here it is {here}");
            return Err(Error::RankDiffers { rank, what });
        }
    }
    Ok(())
}
