//! More ranks than a machine has threads, one after the other.

use super::*;

/// As many ranks as there are GPUs in the largest clusters: what they add up has the same bits in any tree, and is the norm of
/// all their elements.
#[test]
fn the_sum_of_16384_ranks_has_no_order() {
    const TENSORS: usize = 2000;
    const EACH: usize = 8;
    let ranks: u32 = if std::env::var_os("GRADPROBE_SHORT").is_some() { 512 } else { 16_384 };
    let alone = Simulated { ranks, given: Arc::default(), total: Arc::default() };
    let (given, total) = (Arc::clone(&alone.given), Arc::clone(&alone.total));
    let mesh = Mesh::new([("dp", ranks)]).unwrap();
    let names = (0..TENSORS).map(|t| (format!("t{t}"), DType::F32, EACH as u64));
    let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
    let begun = Instant::now();
    let config = Config::default().ranks(Ranks::alike(alone, &mesh, sharded));
    let mut probe = Probe::new(Cpu, Plan::new(names).unwrap(), config).unwrap();
    println!("{ranks} ranks with {TENSORS} tensors come together in {:.1?}", begun.elapsed());
    let mut random = fastrand::Rng::with_seed(5);
    let mut squares = 0u64;
    let mut elements = vec![[0f32; EACH]; TENSORS];
    for _ in 0..ranks {
        for x in elements.as_flattened_mut() {
            // Small integers, of which the exact sum of squares is known; of many sizes, so that tensors are.
            let n = random.i16(-255..256) >> random.u8(..8);
            squares += u64::from(n.unsigned_abs()) * u64::from(n.unsigned_abs());
            *x = f32::from(n);
        }
        let tensors: Vec<HostTensor> = elements.iter().map(|tensor| HostTensor::F32(tensor)).collect();
        probe.measure(&crate::common::host::refs(&tensors)).unwrap();
    }
    let all = std::mem::take(&mut *given.lock().unwrap());
    assert_eq!((all.len(), all[0].len()), (ranks as usize, 30));
    let trees: Vec<Vec<u64>> = (0..5)
        .map(|_| {
            let mut left = all.clone();
            while left.len() > 1 {
                let a = left.swap_remove(random.usize(..left.len()));
                let b = left.swap_remove(random.usize(..left.len()));
                left.push(a.iter().zip(&b).map(|(a, b)| a.wrapping_add(*b)).collect());
            }
            left.swap_remove(0)
        })
        .collect();
    assert!(trees.iter().all(|tree| *tree == trees[0]));
    *total.lock().unwrap() = Some(trees[0].clone());
    let report =
        probe.measure_host(&elements.iter().map(|tensor| HostTensor::F32(tensor)).collect::<Vec<_>>()).unwrap();
    let expected = (squares as f64).sqrt();
    assert!((report.outputs().total_norm / expected - 1.0).abs() < 1e-14, "{} {expected}", report.outputs().total_norm);
}

/// One, 8 or 4096 ranks give the same norm.
#[test]
fn the_norm_of_4096_ranks_is_that_of_one() {
    for ranks in [8u32, 4096] {
        let names = ["a", "b", "c"].map(|name| (name, DType::F32, 8u64));
        let alone = Simulated { ranks, given: Arc::default(), total: Arc::default() };
        let (given, total) = (Arc::clone(&alone.given), Arc::clone(&alone.total));
        let config = Config::default().ranks(sharded(alone));
        let mut probe = Probe::new(Cpu, Plan::new(names).unwrap(), config).unwrap();
        let all: Vec<[f32; 8]> =
            (0..3 * ranks as usize).map(|t| std::array::from_fn(|i| lognormal(t as u64, i, 5.0) as f32)).collect();
        let tensors: Vec<HostTensor> = all.iter().map(|tensor| HostTensor::F32(tensor)).collect();
        for of_rank in tensors.chunks(3) {
            probe.measure(&crate::common::host::refs(of_rank)).unwrap();
        }
        let sum = given
            .lock()
            .unwrap()
            .iter()
            .fold(vec![0u64; 30], |sum, words| sum.iter().zip(words).map(|(a, b)| a.wrapping_add(*b)).collect());
        *total.lock().unwrap() = Some(sum);
        let of_ranks = probe.measure_host(&tensors[..3]).unwrap().outputs().total_norm;
        let plan = plan_of((0..).map(|t: usize| format!("t{t}")).zip(tensors.iter().copied())).unwrap();
        let of_one =
            Probe::new(Cpu, plan, Config::default()).unwrap().measure_host(&tensors).unwrap().outputs().total_norm;
        assert_eq!(of_ranks.to_bits(), of_one.to_bits(), "{ranks} ranks");
    }
}

/// One rank of many that all have the same plan. It notes what the ranks give one after the other, in steps of one probe, and
/// then gives what they add up to.
#[derive(Debug)]
struct Simulated {
    ranks: u32,
    given: Arc<Mutex<Vec<Vec<u64>>>>,
    total: Arc<Mutex<Option<Vec<u64>>>>,
}

impl Transport for Simulated {
    fn rank(&self) -> u32 {
        0
    }

    fn ranks(&self) -> u32 {
        self.ranks
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(own.repeat(self.ranks as usize))
    }

    fn all_reduce(&self, words: &mut [u64], reduction: Reduction) -> Result<(), Error> {
        assert_eq!(reduction, Reduction::Sum);
        // While they come together, a name.
        if words.len() != 30 {
            return Ok(());
        }
        match &*self.total.lock().unwrap() {
            Some(total) => words.copy_from_slice(total),
            None => self.given.lock().unwrap().push(words.to_vec()),
        }
        Ok(())
    }
}
