//! Tensors that have no gradient in a step, on the CPU and in the kernels on the host.

use crate::common::{absent, demand_none, short};
use gradprobe::{Absent, Cpu, DType, Error, Plan, Probe, Tensor};
use gradprobe_simt::{Schedule, Simt};

#[test]
fn the_cpu_conforms() {
    demand_none(&absent::run_all(&mut |plan, config| Probe::new(Cpu, plan, config).unwrap()));
}

#[test]
fn the_kernels_conform_and_equal_the_cpu() {
    let schedules = [(Schedule::Forward, 0), (Schedule::Shuffled(1), 3), (Schedule::Reverse, 1000)];
    for (schedule, blocks) in schedules.into_iter().take(if short() { 1 } else { 3 }) {
        let device = Simt { schedule, blocks, ..Simt::default() };
        let complaints = absent::run_all(&mut |plan, config| Probe::new(device, plan, config).unwrap());
        demand_none(&complaints.into_iter().map(|c| format!("{schedule:?}, {blocks} blocks: {c}")).collect::<Vec<_>>());
    }
}

#[test]
fn a_plan_cannot_be_made_of_what_is_absent() {
    let (bias, none) = ([1.0f32; 3], None::<Vec<half::bf16>>);
    for absent in [&Absent as &dyn Tensor, &none] {
        let refused = Plan::of([("bias", &bias as &dyn Tensor), ("weight", absent)]);
        assert_eq!(refused.err(), Some(Error::AbsentInPlan { name: "weight".to_owned() }));
    }
    let plan = Plan::of([("bias", &bias as &dyn Tensor), ("weight", &Some([half::bf16::ONE; 2]))]);
    assert_eq!(plan, Plan::new([("bias", DType::F32, 3), ("weight", DType::BF16, 2)]));
}
