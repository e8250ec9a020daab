//! Optimizers: against the papers' formulas in f64 over 200 steps, within a bound that grows with the roundings; how far a step
//! moves, against sums in f64; the kernels on the host to the bit; state that goes on; and what is refused.
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "small numbers")]

use crate::common::{
    demand_none,
    host::{refs, refs_mut},
    normal::Normal,
    short,
};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, NonFinitePolicy, Plan, Probe, Tensor,
    TensorMut,
    clip::LossScale,
    optim::{AdamW, Group, Lion, Optimizer, OptimizerState, Sgd, UpdateRecord},
};
use gradprobe_simt::{Schedule, Simt};
use half::{bf16, f16};

/// Half the distance of 1 to the next f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// A tensor of any type on the host.
#[derive(Clone, Debug, PartialEq)]
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Elements {
    fn of(dtype: DType, values: &[f32]) -> Self {
        match dtype {
            DType::F32 => Self::F32(values.to_vec()),
            DType::F16 => Self::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::BF16 => Self::BF16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    fn values(&self) -> Vec<f32> {
        match self {
            Self::F32(all) => all.clone(),
            Self::F16(all) => all.iter().map(|x| x.to_f32()).collect(),
            Self::BF16(all) => all.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// Without the bits of a NaN.
    fn bits(&self) -> Vec<u32> {
        self.values().iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
    }

    fn read(&self) -> &dyn Tensor {
        match self {
            Self::F32(all) => all,
            Self::F16(all) => all,
            Self::BF16(all) => all,
        }
    }

    fn write(&mut self) -> &mut dyn TensorMut {
        match self {
            Self::F32(all) => all,
            Self::F16(all) => all,
            Self::BF16(all) => all,
        }
    }
}

fn read(tensors: &[Elements]) -> Vec<&dyn Tensor> {
    tensors.iter().map(Elements::read).collect()
}

fn write(tensors: &mut [Elements]) -> Vec<&mut dyn TensorMut> {
    tensors.iter_mut().map(Elements::write).collect()
}

fn normals(seed: u64, count: usize, scale: f32) -> Vec<f32> {
    let mut normal = Normal::new(seed);
    (0..count).map(|_| scale * normal.next() as f32).collect()
}

/// Every pair of types, with lengths that end a packet, a tile and a chunk, and others.
const TENSORS: [(&str, DType, DType, usize); 8] = [
    ("a.weight", DType::F32, DType::F32, 70_001),
    ("a.bias", DType::F32, DType::F32, 5),
    ("b.weight", DType::BF16, DType::BF16, 4096),
    ("b.bias", DType::BF16, DType::F32, 2049),
    ("c.weight", DType::F16, DType::F16, 9000),
    ("c.bias", DType::F16, DType::BF16, 768),
    ("d.weight", DType::F32, DType::F16, 32_768),
    ("none", DType::BF16, DType::BF16, 0),
];

fn plan() -> Plan {
    let plan = Plan::new(TENSORS.map(|(name, gradient, _, len)| (name, gradient, len as u64))).unwrap();
    plan.with_weights(TENSORS.map(|(_, _, weight, _)| weight)).unwrap()
}

fn gradients(step: u64, scale: f32) -> Vec<Elements> {
    let of = |(index, (_, dtype, _, len)): (usize, &(&str, DType, DType, usize))| {
        Elements::of(*dtype, &normals(100 * step + index as u64, *len, scale))
    };
    TENSORS.iter().enumerate().map(of).collect()
}

fn weights() -> Vec<Elements> {
    let of = |(index, (_, _, dtype, len)): (usize, &(&str, DType, DType, usize))| {
        Elements::of(*dtype, &normals(7 + index as u64, *len, 0.5))
    };
    TENSORS.iter().enumerate().map(of).collect()
}

fn optimizers() -> [(&'static str, Optimizer); 5] {
    [
        ("adamw", AdamW::new(1e-2).group(Group::new("*bias").weight_decay(0.0).learning_rate_factor(0.5)).into()),
        ("momentum", Sgd::new(1e-2).momentum(0.9).weight_decay(0.01).into()),
        ("nesterov", Sgd::new(1e-2).nesterov(0.9).into()),
        ("sgd", Sgd::new(1e-2).group(Group::new("a.*").weight_decay(0.1)).into()),
        ("lion", Lion::new(1e-3).weight_decay(0.1).into()),
    ]
}

fn probe(optimizer: &Optimizer, config: Config) -> Probe {
    Probe::new(Cpu, plan(), config.optimizer(optimizer.clone())).unwrap()
}

/// The papers' formulas in f64, and how far f32 may be from them: each rounding adds half a unit of what it rounds.
struct Exact {
    rule: &'static str,
    rate: f64,
    decay: f64,
    betas: [f64; 2],
    step: i32,
    /// Value and bound.
    weight: [f64; 2],
    first: [f64; 2],
    second: [f64; 2],
}

impl Exact {
    fn new(rule: &'static str, name: &str, weight: f32) -> Self {
        let bias = name.ends_with("bias");
        let (rate, decay, betas) = match rule {
            "adamw" => (if bias { 5e-3 } else { 1e-2 }, if bias { 0.0 } else { 0.01 }, [0.9, 0.999]),
            "momentum" => (1e-2, 0.01, [0.9, 0.0]),
            "nesterov" => (1e-2, 0.0, [0.9, 0.0]),
            "sgd" => (1e-2, if name.starts_with("a.") { 0.1 } else { 0.0 }, [0.0; 2]),
            _ => (1e-3, 0.1, [0.9, 0.99]),
        };
        let zero = [0.0; 2];
        Self { rule, rate, decay, betas, step: 0, weight: [f64::from(weight), 0.0], first: zero, second: zero }
    }

    /// β·x + share·y of numbers with bounds: β and share are rounded, so are the product and the sum.
    fn average(beta: f64, [x, x_bound]: [f64; 2], share: f64, [y, y_bound]: [f64; 2]) -> [f64; 2] {
        let sum = beta * x + share * y;
        [sum, beta * x_bound + share * y_bound + U * (beta * x.abs() + 2.0 * share * y.abs() + sum.abs())]
    }

    /// One step by a gradient, which was rounded once; `None` where the direction may be either way.
    fn step(&mut self, gradient: f64) -> Option<()> {
        self.step += 1;
        let g = [gradient, U * gradient.abs()];
        let square = [gradient * gradient, 4.0 * U * gradient * gradient];
        let [beta1, beta2] = self.betas;
        let [d, d_bound] = match self.rule {
            "adamw" => {
                self.first = Self::average(beta1, self.first, 1.0 - beta1, g);
                self.second = Self::average(beta2, self.second, 1.0 - beta2, square);
                let ([m, m_bound], [v, v_bound]) = (self.first, self.second);
                let correction1 = 1.0 / (1.0 - beta1.powi(self.step));
                let root_correction2 = (1.0 / (1.0 - beta2.powi(self.step))).sqrt();
                let root = v.sqrt();
                let root_bound = if v > 0.0 { v_bound / root } else { 0.0 } + U * root;
                let divisor = root * root_correction2 + 1e-8;
                let divisor_bound = root_bound * root_correction2 + U * (2.0 * divisor + 1e-8);
                let (top, top_bound) = (m * correction1, m_bound * correction1 + 2.0 * U * (m * correction1).abs());
                let d = top / divisor;
                [d, (top_bound + d.abs() * divisor_bound) / (divisor - divisor_bound) + U * d.abs()]
            }
            "momentum" | "nesterov" => {
                self.first = Self::average(beta1, self.first, 1.0, g);
                if self.rule == "nesterov" { Self::average(beta1, self.first, 1.0, g) } else { self.first }
            }
            "sgd" => g,
            _ => {
                let [mean, bound] = Self::average(beta1, self.first, 1.0 - beta1, g);
                self.first = Self::average(beta2, self.first, 1.0 - beta2, g);
                if mean.abs() <= 2.0 * bound {
                    return None;
                }
                [mean.signum(), 0.0]
            }
        };
        let [w, w_bound] = self.weight;
        let direction = d + self.decay * w;
        let bound = d_bound + self.decay * w_bound + U * (self.decay * w.abs() + direction.abs());
        let after = w - self.rate * direction;
        // The rate is rounded, times the group's factor again.
        let bound = w_bound + self.rate * bound + U * (2.0 * self.rate * direction.abs() + after.abs());
        self.weight = [after, 1.001 * bound + 1e-38];
        Some(())
    }
}

/// So that those formulas are not ours alone: `tests/data/optimizers.py`.
#[test]
fn the_formulas_are_those_of_torch_in_float64() {
    let expected: serde_json::Value = serde_json::from_str(include_str!("../data/optimizers.json")).unwrap();
    let numbers = |key: &str| -> Vec<f64> { serde_json::from_value(expected[key].clone()).unwrap() };
    for (rule, _) in optimizers() {
        for ((i, start), wanted) in numbers("weights").into_iter().enumerate().zip(numbers(rule)) {
            let mut exact = Exact::new(rule, "weight", start as f32);
            if matches!(rule, "momentum" | "sgd") {
                exact.decay = 0.0;
            }
            for step in 1..=expected["steps"].as_u64().unwrap() {
                let whole = (step * 7919 + i as u64 * 104_729) % 1000;
                let gradient = (whole as f64 - 499.5) / 500.0 / 10f64.powi(i as i32);
                exact.step(gradient).unwrap_or_else(|| panic!("{rule} {i}: a sign that rounding decides"));
            }
            let [seen, _] = exact.weight;
            assert!((seen - wanted).abs() < 1e-12, "{rule} {i}: {seen}, torch has {wanted}");
        }
    }
}

#[test]
fn two_hundred_steps_are_the_papers_within_the_roundings() {
    let mut complaints = Vec::new();
    let steps = if short() { 20 } else { 200 };
    for (rule, optimizer) in optimizers() {
        let mut probe = probe(&optimizer, Config::new().clip(Clip::global_norm(1.0)));
        let mut weights = weights();
        let starts: Vec<Vec<f32>> = weights.iter().map(Elements::values).collect();
        // Some elements of each tensor, as its formulas have nothing to do with the others'.
        let watched = |len: usize| (0..len).step_by(len / 37 + 1).chain(len.checked_sub(1));
        let mut exact: Vec<Vec<(usize, Option<Exact>)>> = TENSORS
            .iter()
            .zip(&starts)
            .map(|(&(name, ..), start)| {
                watched(start.len()).map(|i| (i, Some(Exact::new(rule, name, start[i])))).collect()
            })
            .collect();
        for step in 1..=steps {
            let gradients = gradients(step, if step % 3 == 0 { 1e-4 } else { 1.0 });
            probe.update(&read(&gradients), &mut write(&mut weights)).unwrap();
            let coefficient = f64::from(probe.wait().unwrap().outputs().coefficient);
            for (exact, gradient) in exact.iter_mut().zip(&gradients) {
                let gradient = gradient.values();
                for (i, exact) in exact {
                    *exact =
                        exact.take().and_then(|mut of| of.step(f64::from(gradient[*i]) * coefficient).map(|()| of));
                }
            }
        }
        let state = probe.optimizer().unwrap().state().unwrap();
        let mut compared = 0;
        for (((exact, (name, ..)), tensor), weight) in exact.iter().zip(&TENSORS).zip(&state.tensors).zip(&weights) {
            let values = weight.values();
            let kept = if tensor.masters.is_empty() { &values } else { &tensor.masters };
            for (i, exact) in exact {
                let Some(exact) = exact else { continue };
                compared += 1;
                let [value, bound] = exact.weight;
                let error = (f64::from(kept[*i]) - value).abs();
                if error.is_nan() || error > bound || bound > 2e-4 {
                    complaints.push(format!("{rule} {name} {i}: {} not {value}, {error:e} of {bound:e}", kept[*i]));
                }
            }
            if !tensor.masters.is_empty() && Elements::of(dtype_of(weight), &tensor.masters) != *weight {
                complaints.push(format!("{rule} {name}: the weights are not the nearest of their masters"));
            }
            assert_eq!(tensor.steps, if tensor.name == "none" { 0 } else { steps as u32 });
        }
        assert!(compared > 200, "{rule}: {compared} compared");
    }
    demand_none(&complaints);
}

fn dtype_of(elements: &Elements) -> DType {
    match elements {
        Elements::F32(_) => DType::F32,
        Elements::F16(_) => DType::F16,
        Elements::BF16(_) => DType::BF16,
    }
}

/// What a step did, from the weights, or masters, before and after it.
#[test]
fn how_far_a_step_moves_is_what_the_weights_say() {
    for (rule, optimizer) in optimizers() {
        let mut probe = probe(&optimizer, Config::new());
        let (mut weights, mut before) = (weights(), None::<OptimizerState>);
        for step in 1..=3 {
            let starts: Vec<Vec<f32>> = weights.iter().map(Elements::values).collect();
            let gradients = gradients(step, 1.0);
            probe.update(&read(&gradients), &mut write(&mut weights)).unwrap();
            let report = probe.wait().unwrap();
            let state = probe.optimizer().unwrap().state().unwrap();
            for (index, tensor) in report.tensors().enumerate().filter(|(_, tensor)| tensor.len > 0) {
                let update = tensor.update.expect("it was updated");
                let (after, of) = (weights[index].values(), &state.tensors[index]);
                let old = before.as_ref().map_or(&starts[index], |before| {
                    if of.masters.is_empty() { &starts[index] } else { &before.tensors[index].masters }
                });
                let new = if of.masters.is_empty() { &after } else { &of.masters };
                let moved: Vec<f64> = old.iter().zip(new).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
                let squares = |all: &mut dyn Iterator<Item = f64>| all.map(|x| x * x).sum::<f64>();
                let rounded = U * squares(&mut new.iter().map(|&x| f64::from(x))).sqrt();
                let norm = squares(&mut moved.iter().copied()).sqrt();
                let what = format!("{rule}, step {step}, {}", tensor.name);
                assert!((update.update_norm() - norm).abs() <= 1e-6 * norm + rounded, "{what}: {update:?}, {norm}");
                let weight_norm = squares(&mut after.iter().map(|&x| f64::from(x))).sqrt();
                assert!((update.weight_norm() / weight_norm - 1.0).abs() < 5e-7, "{what}: {update:?}");
                let dot: f64 = moved.iter().zip(gradients[index].values()).map(|(u, g)| u * f64::from(g)).sum();
                let scale = norm * tensor.record.l2_norm();
                assert!((update.dot - dot).abs() <= 1e-6 * scale + rounded * tensor.record.l2_norm(), "{what}");
                let cosine = tensor.update_cosine().unwrap();
                assert!((cosine - dot / scale).abs() < 1e-4 && cosine > -0.3, "{what}: {cosine}");
                let first = squares(&mut of.first.iter().map(|&x| f64::from(x)));
                let second: f64 = of.second.iter().map(|&x| f64::from(x)).sum();
                if rule == "adamw" {
                    assert!((update.first_squares / first - 1.0).abs() < 1e-6, "{what}");
                    assert!((update.second_sum / second - 1.0).abs() < 1e-6, "{what}");
                    // Noise alone.
                    assert_eq!(tensor.moments.is_some(), step > 1, "{what}");
                    let gsnr = tensor.moments.unwrap_or_default();
                    assert!(tensor.len < 1000 || gsnr.abs() < 0.2, "{what}: {gsnr}");
                }
                assert_eq!((update.count, update.step, u64::from(update.steps)), (tensor.len, step, step));
                let lost = moved.iter().filter(|&&x| x == 0.0).count() as u64;
                assert!(update.lost == lost && lost < 5 && update.nonfinite_count == 0, "{what}: {update:?}, {lost}");
            }
            before = Some(state);
        }
    }
}

/// Steps with everything that decides how a gradient is taken, and what they leave, without the bits of NaN.
fn run(mut probe: Probe, steps: u64, offset: usize) -> Vec<Vec<u32>> {
    let mut weights = weights();
    let mut left = Vec::new();
    for step in 1..=steps {
        let mut gradients = gradients(step, 3.0);
        if step == 2 {
            let Elements::F32(first) = &mut gradients[0] else { panic!("f32") };
            (first[5], first[40_000]) = (f32::INFINITY, f32::NAN);
        }
        // So many elements in front.
        let shifted = |all: &[Elements]| -> Vec<Elements> {
            all.iter().map(|x| Elements::of(dtype_of(x), &[vec![0.0; offset], x.values()].concat())).collect()
        };
        let (gradients, mut moved) = (shifted(&gradients), shifted(&weights));
        let views: Vec<HostTensor<'_>> = gradients.iter().map(|tensor| view(tensor, offset)).collect();
        let mut given = refs(&views);
        if step == 3 {
            given[2] = &Absent;
        }
        let mut views: Vec<HostTensorMut<'_>> = moved.iter_mut().map(|tensor| view_mut(tensor, offset)).collect();
        let mut to = refs_mut(&mut views);
        probe.update(&given, &mut to).unwrap();
        weights = moved.iter().map(|w| Elements::of(dtype_of(w), &w.values()[offset..])).collect();
        let report = probe.wait().unwrap();
        left.extend(weights.iter().map(Elements::bits));
        left.push(bytemuck::cast_slice(report.updates().unwrap()).to_vec());
    }
    let state = probe.optimizer().unwrap().state().unwrap();
    for tensor in &state.tensors {
        left.extend([&tensor.first, &tensor.second, &tensor.masters].map(|list| Elements::F32(list.clone()).bits()));
        left.push(vec![tensor.steps]);
    }
    left
}

fn view(elements: &Elements, offset: usize) -> HostTensor<'_> {
    match elements {
        Elements::F32(all) => HostTensor::F32(&all[offset..]),
        Elements::F16(all) => HostTensor::F16(&all[offset..]),
        Elements::BF16(all) => HostTensor::BF16(&all[offset..]),
    }
}

fn view_mut(elements: &mut Elements, offset: usize) -> HostTensorMut<'_> {
    match elements {
        Elements::F32(all) => HostTensorMut::F32(&mut all[offset..]),
        Elements::F16(all) => HostTensorMut::F16(&mut all[offset..]),
        Elements::BF16(all) => HostTensorMut::BF16(&mut all[offset..]),
    }
}

#[test]
fn the_kernels_have_the_bits_of_the_cpu_in_any_order_and_at_any_address() {
    let configs = [
        Config::new().clip(Clip::global_norm(1.0)),
        Config::new().clip(Clip::global_norm(1.0)).non_finite(NonFinitePolicy::ZeroNonFinite),
        Config::new().clip(Clip::Value { max_abs: 0.7 }).non_finite(NonFinitePolicy::ZeroNonFinite),
        Config::new().clip(Clip::TensorNorm { max_norm: 1.0 }).loss_scale(LossScale::fixed(1024.0)),
        Config::new().non_finite(NonFinitePolicy::Propagate),
    ];
    let schedules = [Schedule::default(), Schedule::Reverse, Schedule::Shuffled(3)];
    for (index, (rule, optimizer)) in optimizers().into_iter().enumerate() {
        // Under AdamW all of them, under the others one or two.
        let chosen = configs.iter().enumerate().filter(|(c, _)| rule == "adamw" || c % 4 == index % 4);
        for (c, config) in chosen {
            let config = config.clone().optimizer(optimizer.clone());
            let expected = run(Probe::new(Cpu, plan(), config.clone()).unwrap(), 4, 0);
            let orders = if short() { 1 } else { 3 };
            for (which, (schedule, blocks)) in schedules.into_iter().zip([7, 1, 64]).take(orders).enumerate() {
                let simt = Simt { schedule, blocks, ..Simt::default() };
                let seen = run(Probe::new(simt, plan(), config.clone()).unwrap(), 4, which);
                let wrong: Vec<usize> = (0..seen.len()).filter(|&i| seen[i] != expected[i]).collect();
                assert!(wrong.is_empty(), "{rule}, config {c}, {schedule:?}: {wrong:?} of {}", seen.len());
            }
            let seen = run(Probe::new(Cpu, plan(), config).unwrap(), 4, 3);
            assert_eq!(seen, expected, "{rule}, config {c}, misaligned on the CPU");
        }
    }
}

/// Small tensors of one type, on the CPU and on the kernels.
fn small(optimizer: impl Into<Optimizer>, config: Config) -> [Probe; 2] {
    let plan = Plan::new([("first", DType::F32, 3), ("second", DType::BF16, 2)]).unwrap();
    let config = config.optimizer(optimizer);
    let on_cpu = Probe::new(Cpu, plan.clone(), config.clone()).unwrap();
    [on_cpu, Probe::new(Simt::default(), plan, config).unwrap()]
}

#[test]
fn a_step_that_is_skipped_changes_no_bit_and_does_not_count() {
    for mut probe in small(AdamW::new(0.1), Config::new()) {
        let (good, bad, halves) = (vec![1.0f32, 2.0, 3.0], vec![1.0f32, f32::NAN, 3.0], vec![bf16::ONE; 2]);
        let (mut first, mut second) = (vec![1.0f32; 3], vec![bf16::ONE; 2]);
        probe.update(&[&good, &halves], &mut [&mut first, &mut second]).unwrap();
        let state = probe.optimizer().unwrap().state().unwrap();
        let before = (first.clone(), second.clone());
        probe.update(&[&bad, &halves], &mut [&mut first, &mut second]).unwrap();
        let report = probe.wait().unwrap();
        assert!(report.skip() && (&first, &second) == (&before.0, &before.1));
        assert_eq!(report.updates(), Some(&[UpdateRecord::default(); 2][..]));
        assert!(report.tensors().all(|tensor| tensor.update.is_none()));
        assert_eq!(probe.optimizer().unwrap().state().unwrap(), state);
        // An absent tensor keeps all that it has, the other goes on.
        probe.update(&[&good, &Absent], &mut [&mut first, &mut second]).unwrap();
        let after = probe.optimizer().unwrap().state().unwrap();
        assert_eq!((after.tensors[0].steps, &after.tensors[1]), (2, &state.tensors[1]));
        assert!(first != before.0 && second == before.1);
        probe.update(&[&good, &Absent], &mut [&mut first, &mut Absent]).unwrap();
    }
}

#[test]
fn known_answers() {
    for mut probe in small(Sgd::new(0.5), Config::new().clip(Clip::global_norm(1.0))) {
        // Norm 5, clipped to 1.
        let (gradient, none) = (vec![3.0f32, 0.0, -4.0], vec![bf16::ZERO; 2]);
        let (mut first, mut second) = (vec![1.0f32; 3], vec![bf16::ONE; 2]);
        probe.update(&[&gradient, &none], &mut [&mut first, &mut second]).unwrap();
        let report = probe.wait().unwrap();
        let c = report.outputs().coefficient;
        assert_eq!(first, [1.0 - 0.5 * (3.0 * c), 1.0, 1.0 + 0.5 * (4.0 * c)]);
        let update = report.tensors().next().unwrap();
        assert!((update.update.unwrap().update_norm() - 0.5).abs() < 1e-6);
        assert!((update.update_cosine().unwrap() - 1.0).abs() < 1e-6);
        assert_eq!(report.tensors().nth(1).unwrap().update_cosine(), None);
        // A learning rate that moves nothing loses nothing; one too small for the weights loses all.
        for (rate, lost) in [(0.0, 0), (1e-9, 2)] {
            probe.optimizer().unwrap().set_learning_rate(rate).unwrap();
            assert_eq!(probe.optimizer().unwrap().learning_rate(), rate);
            let before = first.clone();
            probe.update(&[&gradient, &none], &mut [&mut first, &mut second]).unwrap();
            let report = probe.wait().unwrap();
            assert_eq!(report.updates().unwrap()[0].lost, lost);
            assert_eq!(first, before);
        }
        // A weight that is set from outside is where it goes on from, master or not; one that overflows is counted.
        second = vec![bf16::from_f32(2.0); 2];
        first[0] = f32::MAX;
        probe.optimizer().unwrap().set_learning_rate(1e38).unwrap();
        let up = vec![-1.0f32, 0.0, 0.0];
        probe.update(&[&up, &vec![bf16::from_f32(1e-38); 2]], &mut [&mut first, &mut second]).unwrap();
        let report = probe.wait().unwrap();
        assert_eq!(second[0], bf16::from_f32(1.0));
        assert_eq!((report.updates().unwrap()[0].nonfinite_count, first[0]), (1, f32::INFINITY));
    }
}

#[test]
fn a_state_that_was_saved_goes_on_with_the_same_bits() {
    for (rule, optimizer) in optimizers() {
        let mut whole = probe(&optimizer, Config::new());
        let mut expected = weights();
        let mut half = Vec::new();
        for step in 1..=6 {
            whole.update(&read(&gradients(step, 1.0)), &mut write(&mut expected)).unwrap();
            if step == 3 {
                half = vec![(expected.clone(), whole.optimizer().unwrap().state().unwrap())];
            }
        }
        let (mut weights, state) = half.remove(0);
        let mut resumed = probe(&optimizer, Config::new());
        resumed.optimizer().unwrap().restore(&state).unwrap();
        assert_eq!(resumed.optimizer().unwrap().state().unwrap(), state, "{rule}");
        for step in 4..=6 {
            resumed.update(&read(&gradients(step, 1.0)), &mut write(&mut weights)).unwrap();
        }
        assert_eq!(weights, expected, "{rule}");
        assert_eq!(resumed.optimizer().unwrap().state().unwrap(), whole.optimizer().unwrap().state().unwrap());

        let refused = |change: &dyn Fn(&mut OptimizerState)| {
            let mut other = state.clone();
            change(&mut other);
            let mut probe = probe(&optimizer, Config::new());
            let before = probe.optimizer().unwrap().state().unwrap();
            let refused = probe.optimizer().unwrap().restore(&other).unwrap_err().to_string();
            assert_eq!(probe.optimizer().unwrap().state().unwrap(), before);
            refused
        };
        let other = refused(&|state| state.optimizer = "adagrad".to_owned());
        assert!(other.contains("its optimizer is adagrad, and the probe's"), "{other}");
        let fewer = refused(&|state| drop(state.tensors.pop()));
        assert_eq!(fewer, "the state does not fit this probe: its optimizer has 7 tensors, and the plan 8");
        let renamed = refused(&|state| state.tensors[1].name = "x".to_owned());
        assert!(renamed.ends_with("it has tensor \"x\" where the plan has \"a.bias\""), "{renamed}");
        let longer = refused(&|state| state.tensors[0].first.push(0.0));
        assert!(longer.contains("tensor \"a.weight\" has "), "{longer}");
    }
}

#[test]
fn what_cannot_be_is_one_clear_error_and_changes_nothing() {
    let plan = || Plan::new([("first", DType::F32, 3), ("second", DType::BF16, 2)]).unwrap();
    let cases: [(Optimizer, &str); 10] = [
        (AdamW::new(f64::NAN).into(), "learning_rate must be finite and not negative, not NaN"),
        (AdamW::new(-1.0).into(), "learning_rate must be finite and not negative, not -1"),
        (AdamW::new(1e99).into(), "learning_rate must be finite and not negative, not 1000"),
        (AdamW::new(0.1).betas(0.9, 1.0).into(), "beta must be at least 0 and below 1, not 1"),
        (Lion::new(0.1).betas(-0.1, 0.9).into(), "beta must be at least 0 and below 1, not -0.1"),
        (Sgd::new(0.1).momentum(f64::NAN).into(), "momentum must be at least 0 and below 1, not NaN"),
        (AdamW::new(0.1).epsilon(0.0).into(), "epsilon must be a normal f32 above 0, not 0"),
        (Sgd::new(0.1).weight_decay(-1.0).into(), "weight_decay must be finite and not negative, not -1"),
        (
            AdamW::new(0.1).group(Group::new("*").learning_rate_factor(f64::INFINITY)).into(),
            "learning_rate_factor must be finite and not negative, not inf",
        ),
        (AdamW::new(0.1).group(Group::new("third*")).into(), "no tensor's name matches \"third*\""),
    ];
    for (optimizer, message) in cases {
        let refused = Config::new().optimizer(optimizer).bytes(&plan()).unwrap_err();
        assert!(refused.to_string().starts_with(message), "{refused}");
    }
    for mut probe in small(AdamW::new(0.1).group(Group::new("third*").if_any()), Config::new()) {
        let (gradient, halves) = (vec![1.0f32; 3], vec![bf16::ONE; 2]);
        let (mut first, mut second, mut long) = (vec![1.0f32; 3], vec![bf16::ONE; 2], vec![1.0f32; 4]);
        let name = |name: &str| name.to_owned();
        let mut room = probe.optimizer().unwrap();
        let unmeasured = room.step(&[&gradient, &halves], &mut [&mut first, &mut second]);
        assert_eq!(unmeasured, Err(Error::NotMeasured));
        assert!(room.set_learning_rate(-0.5).is_err() && room.learning_rate() == 0.1);
        let refused = probe.update(&[&gradient, &halves], &mut [&mut first]);
        assert_eq!(refused, Err(Error::TensorCount { planned: 2, given: 1, first: Some("second".to_owned()) }));
        let refused = probe.update(&[&gradient, &halves], &mut [&mut long, &mut second]);
        assert!(matches!(refused, Err(Error::TensorMismatch { name, .. }) if name == "first"));
        let refused = probe.update(&[&gradient, &halves], &mut [&mut first, &mut Absent]);
        assert_eq!(refused, Err(Error::WithoutWeight { name: name("second") }));
        let refused = probe.update(&[&Absent, &Absent], &mut [&mut first, &mut second]);
        assert_eq!(refused, Err(Error::AllAbsent));
        assert_eq!(probe.wait().map(drop), Err(Error::NotMeasured), "nothing was launched");
        overlaps(&mut probe);
        assert_eq!((first, second), (vec![1.0; 3], halves.clone()));
        assert_eq!(probe.optimizer().unwrap().state().unwrap().tensors[0].steps, 0);
    }
}

/// Weights that share memory with one another, or with a gradient.
#[allow(unsafe_code, reason = "gives the probe bare addresses")]
fn overlaps(probe: &mut Probe) {
    let mut memory = [1.0f32; 8];
    let base = memory.as_mut_ptr() as u64;
    // SAFETY: they are refused, so nothing is read or written.
    let [mut low, mut within, mut apart] = unsafe {
        [(base, 3, DType::F32), (base + 4, 2, DType::BF16), (base + 16, 2, DType::BF16)]
            .map(|(address, len, dtype)| gradprobe::RawTensor::new(address, len, dtype))
    };
    let (gradient, halves) = (vec![1.0f32; 3], vec![bf16::ONE; 2]);
    let refused = probe.update(&[&gradient, &halves], &mut [&mut low, &mut within]);
    let (first, second) = ("weight of first".to_owned(), "weight of second".to_owned());
    assert_eq!(refused, Err(Error::Overlap { first: first.clone(), second }));
    let of_gradient = within;
    let refused = probe.update(&[&gradient, &of_gradient], &mut [&mut low, &mut apart]);
    assert_eq!(refused, Err(Error::Overlap { first, second: "second".to_owned() }));
    assert_eq!(memory, [1.0; 8]);
}
