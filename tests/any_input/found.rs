//! What any input has found: each was a panic, or an hour.

use gradprobe::{
    Clip, Config, Cpu, DType, Error, Plan, Probe, ProbeState, Tensor,
    clip::{AdaptiveClip, LossScale},
    gsnr::{AccumulationNoise, GsnrConfig},
    optim::AdamW,
    ranks::{Along, Mesh, Ranks, Reduction, ThreadCommunicator, Transport},
};
use std::time::{Duration, Instant};

const TWO: [f32; 2] = [3.0, 4.0];

fn probe(config: Config) -> Probe {
    Probe::new(Cpu, Plan::new([("w", DType::F32, 2)]).unwrap(), config).unwrap()
}

#[test]
fn names_may_be_longer_than_a_format_can_pad() {
    let name = "ä".repeat(70_000);
    let plan = Plan::new([(name.as_str(), DType::F32, 2), ("b", DType::F32, 2)]).unwrap();
    let config = Config::new().histogram().dot().tracking(GsnrConfig::new()).adaptive_clip(AdaptiveClip::new([1, 0]));
    let mut probe = Probe::new(Cpu, plan.clone(), config).unwrap();
    let tensors: [&dyn Tensor; 2] = [&TWO, &TWO];
    for _ in 0..2 {
        probe.step(&mut [&mut TWO.clone(), &mut TWO.clone()]).unwrap();
    }
    let report = probe.wait().unwrap();
    let mut adaptive = probe.adaptive_clip().unwrap();
    adaptive.clip(&mut [&mut TWO.clone(), &mut TWO.clone()], &tensors).unwrap();
    let adaptive = adaptive.report().unwrap();
    let tables = [
        report.to_string(),
        adaptive.to_string(),
        probe.histogram().unwrap().measure(&tensors).unwrap().to_string(),
        probe.dot().unwrap().measure(&tensors, &tensors).unwrap().to_string(),
        probe.gsnr().unwrap().report().unwrap().to_string(),
        AccumulationNoise::new(plan, 2).unwrap().to_string(),
    ];
    assert!(tables.iter().all(|table| table.contains(&name)));
}

#[test]
fn states_of_no_probe_are_refused_and_those_of_odd_ones_go_on() {
    let clip = Clip::Percentile { percentile: 50.0, history: 2, max_norm: None };
    let mut probe = probe(Config::new().clip(clip).loss_scale(LossScale::dynamic()).history(2));
    probe.measure(&[&TWO]).unwrap();
    let state = probe.state().unwrap();
    probe.restore(&state).unwrap();
    let changed = |change: &dyn Fn(&mut ProbeState)| {
        let mut changed = state.clone();
        change(&mut changed);
        changed
    };
    let word = |place: usize, word: u64| changed(&|state| state.clip[place] = word);
    let late = changed(&|state| state.measured = u64::MAX);
    let (nan, one) = (f64::NAN.to_bits(), 1f64.to_bits());
    for odd in [late, word(0, u64::MAX), word(0, 2), word(4, nan), word(4, one), word(6, one)] {
        let refused = probe.restore(&odd);
        assert!(matches!(refused, Err(Error::StateOfAnotherProbe { .. })), "{odd:?}: {refused:?}");
    }
    probe.restore(&changed(&|state| state.loss_scale = Some((65536.0, u32::MAX)))).unwrap();
    probe.measure(&[&TWO]).unwrap();
    assert_eq!((probe.wait().unwrap().step(), probe.state().unwrap().loss_scale), (2, Some((131_072.0, 0))));
}

#[test]
fn an_optimizer_restored_after_any_number_of_steps_is_there_at_once() {
    let mut probe = probe(Config::new().optimizer(AdamW::new(1e-3)));
    let mut room = probe.optimizer().unwrap();
    let mut state = room.state().unwrap();
    state.tensors[0].steps = u32::MAX;
    let begun = Instant::now();
    room.restore(&state).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2));
    let mut weight = [1.0f32; 2];
    probe.update(&[&TWO], &mut [&mut weight]).unwrap();
    // As a kernel counts.
    assert_eq!(probe.wait().unwrap().updates().unwrap()[0].steps, 0);
    assert!(weight.iter().all(|weight| (0.9..1.0).contains(weight)));
}

#[test]
fn a_layout_of_a_larger_mesh_is_of_another_mesh() {
    let [larger, mesh] = [5, 1].map(|length| Mesh::new([("dp", length), ("tp", 1)]).unwrap());
    let layout = larger.layout([("dp", Along::At(4))]).unwrap();
    let plan = Plan::new([("w", DType::F32, 2)]).unwrap();
    let ranks = Ranks::new(ThreadCommunicator::group(1).remove(0), &mesh, [layout]);
    let refused = Probe::new(Cpu, plan, Config::new().ranks(ranks)).map(drop);
    assert!(matches!(refused, Err(Error::Placement { .. })), "{refused:?}");
}

#[test]
fn the_longest_deadline_is_one() {
    let end = ThreadCommunicator::group(1).remove(0).with_deadline(Duration::MAX);
    assert_eq!(end.all_gather(&[7]), Ok(vec![7]));
}

/// A transport that gives less than all ranks gave, or says that there are none.
#[derive(Debug)]
struct Odd {
    ranks: u32,
}

impl Transport for Odd {
    fn rank(&self) -> u32 {
        0
    }
    fn ranks(&self) -> u32 {
        self.ranks
    }
    fn all_gather(&self, _: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(vec![0; 8])
    }
}

#[test]
fn a_transport_that_loses_something_is_an_error() {
    for ranks in [0, 2] {
        let lost = Odd { ranks }.all_reduce(&mut [1, 2], Reduction::Sum);
        assert!(matches!(lost, Err(Error::Communication { .. })), "{lost:?}");
        let plan = Plan::new([("w", DType::F32, 2)]).unwrap();
        let made = Probe::new(Cpu, plan, Config::new().ranks(Ranks::data_parallel(Odd { ranks })));
        assert!(made.is_err(), "{ranks} ranks");
    }
}
