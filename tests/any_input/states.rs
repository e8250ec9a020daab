//! Saved states of any bytes: they are refused, or a probe goes on from them, and nothing panics.

use crate::{
    Many, Rare,
    calls::{Call, Memory, call},
    config::{AnyConfig, AnyPlan},
    for_any,
};
use arbitrary::Arbitrary;
use gradprobe::{Cpu, Error, Probe, ProbeState};

#[derive(Arbitrary, Debug)]
struct Session {
    plan: AnyPlan,
    config: AnyConfig,
    before: Many<Call, 8>,
    /// Where, whether near the beginning, and which byte is then there.
    damage: Many<(u16, bool, u8), 4>,
    cut: Rare<u16>,
    after: Many<Call, 8>,
}

/// What comes before the elements of tensors: numbers, names and lengths.
const BEGINNING: usize = 300;

fn run(Session { plan: any_plan, config, before, damage, cut, after }: Session) -> Result<(), Error> {
    let plan = any_plan.plan()?;
    let mut probe = Probe::new(Cpu, plan, config.config(&any_plan))?;
    let mut memory = Memory::new(&any_plan);
    for next in &before.0 {
        let _ = call(&mut probe, &any_plan, &mut memory, next);
    }
    let of = |probe: &mut Probe| Ok(postcard::to_stdvec(&probe.state()?).expect("every state can be serialized"));
    let whole: Vec<u8> = of(&mut probe)?;
    let mut bytes = whole.clone();
    for &(place, is_early, byte) in &damage.0 {
        let places = if is_early { bytes.len().min(BEGINNING) } else { bytes.len() };
        bytes[place as usize % places] = byte;
    }
    if let Some(length) = cut.0 {
        bytes.truncate(length as usize % bytes.len());
    }
    let Ok(state) = postcard::from_bytes::<ProbeState>(&bytes) else { return Ok(()) };
    match probe.restore(&state) {
        Ok(()) => {}
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(of(&mut probe)? == whole, "an error has changed nothing: {error}");
        }
    }
    let known = [Call::Wait, Call::History, Call::Gsnr, Call::SampleReport];
    for next in after.0.iter().chain(&known) {
        let _ = call(&mut probe, &any_plan, &mut memory, next);
    }
    Ok(())
}

#[test]
fn any_state_is_refused_or_gone_on_from() {
    for_any!(Session, |session| drop(run(session)));
}
