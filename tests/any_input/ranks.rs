//! Meshes and layouts of any numbers, on one rank and on two.

use crate::{Many, Rare, for_any};
use arbitrary::Arbitrary;
use gradprobe::{
    Config, Cpu, DType, Plan, Probe,
    ranks::{Along, Layout, Mesh, Ranks, ReplicaCheck, ThreadCommunicator},
};
use std::thread;

const NAMES: [&str; 4] = ["dp", "tp", "pp", ""];

#[derive(Arbitrary, Debug)]
struct AnyMesh(Many<(u8, u8, u32), 3>);

impl AnyMesh {
    /// Most of the time of a rank or two.
    fn mesh(&self) -> Option<Mesh> {
        let dimension = |&(name, small, any): &(u8, u8, u32)| {
            (NAMES[name as usize % 4], if small < 250 { [1, 1, 2][small as usize % 3] } else { any })
        };
        Mesh::new(self.0.0.iter().map(dimension)).ok()
    }
}

#[derive(Arbitrary, Debug)]
struct AnyLayout {
    along: Many<(u8, u8, u32), 3>,
    /// From, to, of.
    part: Option<(u8, Rare<u64>, u8)>,
}

impl AnyLayout {
    fn layout(&self, mesh: &Mesh) -> Option<Layout> {
        let how = |how: u8, at: u32| match how % 4 {
            0 => Along::Replicated,
            1 => Along::Sharded,
            2 => Along::At(at % 2),
            _ => Along::At(at),
        };
        let along = self.along.0.iter().map(|&(name, h, at)| (NAMES[name as usize % 4], how(h, at)));
        let layout = mesh.layout(along).ok()?;
        let Some((start, end, whole)) = self.part else { return Some(layout) };
        let start = u64::from(start % 8);
        Some(layout.part(start..end.0.unwrap_or(start + 2), (whole % 16).into()))
    }
}

#[derive(Arbitrary, Debug)]
struct Group {
    mesh: AnyMesh,
    /// That layouts may come from as well.
    other: Option<AnyMesh>,
    layouts: Many<(bool, AnyLayout), 3>,
    lengths: [u8; 2],
    check: u8,
    whole: bool,
    rank: u32,
}

/// Each rank makes its probe and a step, or none has one.
fn come_together(group: Group) {
    let (Some(mesh), Some(other)) =
        (group.mesh.mesh(), group.other.map_or_else(|| group.mesh.mesh(), |other| other.mesh()))
    else {
        return;
    };
    assert_eq!(mesh.coordinates(group.rank).len(), mesh.dimensions().len());
    let of = |(is_of_other, layout): &(bool, AnyLayout)| layout.layout(if *is_of_other { &other } else { &mesh });
    let Some(layouts) = group.layouts.0.iter().map(of).collect::<Option<Vec<Layout>>>() else { return };
    let ranks = mesh.ranks().min(2);
    let made = thread::scope(|scope| {
        let ends = ThreadCommunicator::group(ranks).into_iter().zip(group.lengths);
        let (mesh, layouts) = (&mesh, &layouts);
        let make = |(end, len): (ThreadCommunicator, u8)| {
            scope.spawn(move || {
                let names = (0..layouts.len()).map(|place| (place.to_string(), DType::F32, u64::from(len % 8)));
                let checks = [ReplicaCheck::Reported, ReplicaCheck::Strict, ReplicaCheck::Off];
                let of_group = Ranks::new(end, mesh, layouts.clone()).replica_check(checks[group.check as usize % 3]);
                let of_group = if group.whole { of_group.whole_tensors() } else { of_group };
                let mut probe = Probe::new(Cpu, Plan::new(names).ok()?, Config::new().ranks(of_group)).ok()?;
                let tensors: Vec<Vec<f32>> = layouts.iter().map(|_| vec![1.0; len as usize % 8]).collect();
                probe.measure(&tensors.iter().map(|tensor| tensor as _).collect::<Vec<_>>()).unwrap();
                let report = probe.wait().unwrap();
                assert!(!report.to_string().is_empty());
                let mut room = probe.ranks().unwrap();
                let _ = (room.model(), room.differing_replicas());
                Some(report.outputs().total_norm.to_bits())
            })
        };
        let threads: Vec<_> = ends.map(make).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(made.iter().all(|rank| rank.is_some() == made[0].is_some()), "all or none: {made:?}");
}

#[test]
fn any_ranks_come_together_or_are_refused() {
    for_any!(Group, come_together);
}
