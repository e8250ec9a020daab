//! Ranks in a grid of named dimensions.

use crate::Error;
use std::ops::Range;

/// Arranges ranks in a grid of named dimensions, as PyTorch's `DeviceMesh`: rank 1 is the neighbour of rank 0 along the
/// last.
///
/// ```
/// use gradprobe::ranks::{Along, Mesh};
///
/// let mesh = Mesh::new([("dp", 2), ("tp", 4)])?;
/// let norm = mesh.layout([])?; // the same on all ranks
/// let matrix = mesh.layout([("tp", Along::Sharded)])?; // a part on each rank of a tensor-parallel group
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mesh {
    dimensions: Vec<(String, u32)>,
}

/// Tells how a tensor lies along a dimension of a [`Mesh`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Along {
    /// All ranks hold the same. This is the default along a dimension that is not named. The tensor counts at
    /// coordinate 0.
    Replicated,
    /// Each rank holds a part, which may be empty.
    Sharded,
    /// The ranks at this coordinate own it. Others may hold the same, to clip it say; it does not count there.
    At(u32),
}

/// Tells how a tensor lies along all dimensions: [`Mesh::layout`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    pub(super) along: Vec<Along>,
    pub(super) part: Option<(Range<u64>, u64)>,
}

impl Mesh {
    /// Makes a mesh with these dimensions and their lengths.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless each has a name of its own and a rank, and there are fewer than 2^31 ranks.
    pub fn new<N: Into<String>>(dimensions: impl IntoIterator<Item = (N, u32)>) -> Result<Self, Error> {
        let dimensions: Vec<(String, u32)> =
            dimensions.into_iter().map(|(name, length)| (name.into(), length)).collect();
        let is_twice =
            |(at, (name, _)): (usize, &(String, u32))| dimensions[..at].iter().any(|(other, _)| other == name);
        let ranks =
            dimensions.iter().try_fold(1i32, |ranks, (_, length)| ranks.checked_mul(i32::try_from(*length).ok()?));
        if dimensions.iter().enumerate().any(is_twice) || ranks.is_none_or(|ranks| ranks == 0) {
            let expected = "of dimensions with names of their own, each of at least 1, and fewer than 2^31 ranks";
            return Err(Error::InvalidConfig { option: "mesh", expected, value: format!("{dimensions:?}") });
        }
        Ok(Self { dimensions })
    }

    /// Makes a mesh of one dimension.
    pub(super) fn line(ranks: u32) -> Self {
        Self { dimensions: vec![("dp".to_owned(), ranks)] }
    }

    /// The names and lengths of its dimensions.
    pub fn dimensions(&self) -> &[(String, u32)] {
        &self.dimensions
    }

    /// Number of ranks.
    pub fn ranks(&self) -> u32 {
        self.dimensions.iter().map(|(_, length)| length).product()
    }

    /// Gives the coordinates of a rank, one a dimension. A rank beyond the mesh has those of its number modulo the
    /// number of ranks.
    pub fn coordinates(&self, rank: u32) -> Vec<u32> {
        let mut rest = rank;
        let mut coordinates: Vec<u32> = self
            .dimensions
            .iter()
            .rev()
            .map(|(_, length)| {
                let coordinate = rest % length;
                rest /= length;
                coordinate
            })
            .collect();
        coordinates.reverse();
        coordinates
    }

    /// Makes the layout of a tensor along these dimensions; along the others it is replicated. Where several are
    /// sharded, parts are in the order of the ranks.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for an unknown dimension, or one given twice, and a coordinate beyond its length.
    pub fn layout<'a>(&self, along: impl IntoIterator<Item = (&'a str, Along)>) -> Result<Layout, Error> {
        let mut wanted = vec![None; self.dimensions.len()];
        for (name, how) in along {
            let place = self.dimensions.iter().position(|(other, _)| other == name);
            let is_beyond = |place: usize| matches!(how, Along::At(at) if at >= self.dimensions[place].1);
            match place.filter(|&place| wanted[place].is_none() && !is_beyond(place)) {
                Some(place) => wanted[place] = Some(how),
                None => {
                    let expected = "along a dimension of the mesh, named once, and within its length";
                    let value = format!("{how:?} along {name:?} of {:?}", self.dimensions);
                    return Err(Error::InvalidConfig { option: "layout", expected, value });
                }
            }
        }
        Ok(Layout { along: wanted.into_iter().map(|how| how.unwrap_or(Along::Replicated)).collect(), part: None })
    }
}

impl Layout {
    /// Gives the elements of the `whole` that this rank has. All ranks then check, before the first step, that their
    /// parts make up the tensor. For parts that follow one another in memory, as those of FSDP and ZeRO.
    #[must_use]
    pub fn part(self, elements: Range<u64>, whole: u64) -> Self {
        Self { part: Some((elements, whole)), ..self }
    }

    pub(super) fn replicated(mesh: &Mesh) -> Self {
        Self { along: vec![Along::Replicated; mesh.dimensions.len()], part: None }
    }

    /// Whether it may be a layout of this mesh: the same number of dimensions, and no coordinate beyond them.
    pub(super) fn is_of(&self, mesh: &Mesh) -> bool {
        let is_within = |(how, (_, length)): (&Along, &(String, u32))| !matches!(how, Along::At(at) if at >= length);
        self.along.len() == mesh.dimensions.len() && self.along.iter().zip(&mesh.dimensions).all(is_within)
    }

    /// Whether every rank holds all of it.
    pub(super) fn is_replicated(&self) -> bool {
        self.along.iter().all(|how| *how == Along::Replicated)
    }

    /// Gives the rank that counts a rank's elements.
    pub(super) fn counted_on(&self, mesh: &Mesh, rank: u32) -> u32 {
        self.moved(mesh, rank, |how, coordinate| match how {
            Along::Replicated => 0,
            Along::Sharded => coordinate,
            Along::At(at) => at,
        })
    }

    /// The first rank that counts some of it.
    pub(super) fn first(&self, mesh: &Mesh) -> u32 {
        self.moved(mesh, 0, |how, _| if let Along::At(at) = how { at } else { 0 })
    }

    /// Gives the same number for all ranks with the same coordinates along the dimensions in which the tensor is at
    /// one.
    pub(super) fn owners_of(&self, mesh: &Mesh, rank: u32) -> u32 {
        self.moved(mesh, rank, |how, coordinate| if matches!(how, Along::At(_)) { coordinate } else { 0 })
    }

    /// Gives the rank at other coordinates than this one.
    fn moved(&self, mesh: &Mesh, rank: u32, to: impl Fn(Along, u32) -> u32) -> u32 {
        let (mut rest, mut stride, mut moved) = (rank, 1, 0);
        for (&how, (_, length)) in self.along.iter().zip(&mesh.dimensions).rev() {
            moved += to(how, rest % length) * stride;
            rest /= length;
            stride *= length;
        }
        moved
    }
}
