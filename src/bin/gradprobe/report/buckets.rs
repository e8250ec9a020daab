//! Any number of steps in a limited number of buckets.

/// Joins two steps into one.
pub trait Join {
    /// Adds a later step.
    fn join(&mut self, later: Self);
}

/// Keeps steps in buckets of equally many step numbers. When they reach beyond the last of `limit` buckets, each two
/// become one: half the limit or more are in use from then on. A bucket without a step takes no room.
pub struct Buckets<T> {
    limit: u64,
    /// Step numbers of a bucket.
    width: u64,
    filled: Vec<Bucket<T>>,
    start: u64,
}

/// One bucket.
pub struct Bucket<T> {
    index: u64,
    /// The first and the last step in it.
    pub first: u64,
    pub last: u64,
    pub of: T,
}

impl<T: Join> Buckets<T> {
    pub fn new(limit: u64) -> Self {
        Self { limit, width: 1, filled: Vec::new(), start: 0 }
    }

    /// Adds a step after all others.
    pub fn add(&mut self, step: u64, of: T) {
        if self.filled.is_empty() {
            self.start = step;
        }
        while (step - self.start) / self.width >= self.limit {
            self.halve();
        }
        self.push(Bucket { index: (step - self.start) / self.width, first: step, last: step, of });
    }

    /// Joins each two buckets.
    pub fn halve(&mut self) {
        self.width *= 2;
        for mut bucket in std::mem::take(&mut self.filled) {
            bucket.index /= 2;
            self.push(bucket);
        }
    }

    fn push(&mut self, bucket: Bucket<T>) {
        match self.filled.last_mut() {
            Some(last) if last.index == bucket.index => {
                last.last = bucket.last;
                last.of.join(bucket.of);
            }
            _ => self.filled.push(bucket),
        }
    }

    /// The buckets with a step, in order.
    pub fn filled(&self) -> &[Bucket<T>] {
        &self.filled
    }
}
