//! An optimizer on the GPU: the weights, the state and the report of the CPU, call by call and from a graph.

use super::*;
use common::host;
use gradprobe::optim::AdamW;

fn declared() -> Config {
    clipping().optimizer(AdamW::new(1e-2))
}

/// What a step leaves, but for the weights.
fn left(probe: &mut Probe) -> (Vec<u8>, gradprobe::optim::OptimizerState) {
    let report = probe.wait().unwrap();
    let state = probe.optimizer().unwrap().state().unwrap();
    (bytemuck::cast_slice(report.updates().unwrap()).to_vec(), state)
}

/// The same on the CPU.
fn on_host(cpu: &mut Probe, gradients: &Tensors, weights: &mut Tensors) {
    cpu.update(&host::refs(&gradients.hosts()), &mut host::refs_mut(&mut weights.hosts_mut())).unwrap();
}

#[test]
fn updates_have_the_bits_of_the_cpu() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut cpu, mut probe) = (cpu(declared()), probe(&stream, declared()));
    let mut expected = Tensors::of(9);
    let mut weights = OnDevice::new(&stream, &expected);
    for step in 1..=3 {
        let mut gradients = Tensors::of(step);
        if step == 2 {
            gradients.f16[7] = f16::NAN;
        }
        let on_device = OnDevice::new(&stream, &gradients);
        probe.update(&on_device.slices(), &mut weights.slices_mut()).unwrap();
        on_host(&mut cpu, &gradients, &mut expected);
        assert!(left(&mut probe) == left(&mut cpu), "step {step}");
        assert!(weights.get() == expected, "step {step}");
    }
    // A state of the one is one of the other.
    let state = cpu.optimizer().unwrap().state().unwrap();
    let mut other = super::probe(&stream, declared());
    other.optimizer().unwrap().restore(&state).unwrap();
    assert_eq!(other.optimizer().unwrap().state().unwrap(), state);
}

#[test]
fn a_graph_trains_and_takes_a_learning_rate_that_is_set_between_replays() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut cpu, mut probe) = (cpu(declared()), probe(&stream, declared()));
    let mut expected = Tensors::of(9);
    let (mut gradients, weights) = (OnDevice::new(&stream, &Tensors::of(1)), OnDevice::new(&stream, &expected));
    let (from, to) = (gradients.raw(), weights.raw());
    let update = |probe: &mut Probe| {
        let mut to = to;
        probe.update(&refs(&from), &mut to.each_mut().map(|tensor| tensor as &mut dyn TensorMut)).unwrap();
    };
    // So that the device knows where the weights are.
    update(&mut probe);
    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&refs(&from), &[]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    update(&mut probe);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    for step in 1..=4 {
        let tensors = Tensors::of(step);
        if step > 1 {
            gradients.set(&tensors);
            for probe in [&mut probe, &mut cpu] {
                probe.optimizer().unwrap().set_learning_rate(1e-2 / step as f64).unwrap();
            }
            graph.launch().unwrap();
        }
        on_host(&mut cpu, &tensors, &mut expected);
        assert!(left(&mut probe) == left(&mut cpu), "step {step}");
        assert!(weights.get() == expected, "step {step}");
    }
}
