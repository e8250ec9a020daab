//! Normal deviates from a seed, for answers that are known on average.

/// Numbers with mean 0 and variance 1.
#[derive(Clone)]
pub struct Normal {
    random: u64,
    /// The second of the last pair.
    next: Option<f64>,
}

impl Normal {
    pub fn new(seed: u64) -> Self {
        Self { random: seed, next: None }
    }

    /// In (0, 1]: SplitMix64.
    #[expect(clippy::cast_precision_loss, reason = "53 bits")]
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 11) as f64 / 9_007_199_254_740_992.0 + 1.0 / 18_014_398_509_481_984.0
    }

    /// Box and Muller (1958).
    pub fn next(&mut self) -> f64 {
        if let Some(next) = self.next.take() {
            return next;
        }
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        self.next = Some(radius * angle.sin());
        radius * angle.cos()
    }
}
