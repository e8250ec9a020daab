//! Ranks that reach each other by TCP, and as processes: what they exchange, and what becomes of those whose peers are gone,
//! late or something else.

use gradprobe::{
    Error,
    ranks::{Reduction, TcpCommunicator, Transport},
};
use std::{
    io::Write,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

const LONG: Duration = Duration::from_secs(60);

/// An address at which nobody listens.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// What each rank makes of it.
fn on_ranks<T: Send>(ranks: u32, deadline: Duration, run: impl Fn(u32, TcpCommunicator) -> T + Sync) -> Vec<T> {
    let (address, run) = (free(), &run);
    thread::scope(|scope| {
        let thread = |rank| {
            scope.spawn(move || run(rank, TcpCommunicator::with_deadline(address, rank, ranks, deadline).unwrap()))
        };
        let threads: Vec<_> = (0..ranks).map(thread).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn what_ranks_give_comes_to_all_in_their_order() {
    for ranks in [1, 2, 5] {
        let seen = on_ranks(ranks, LONG, |rank, end| {
            let gathered: Vec<Vec<u8>> =
                (0..20).map(|step| end.all_gather(&[u8::try_from(rank).unwrap(), step]).unwrap()).collect();
            let large = vec![u8::try_from(rank).unwrap(); 300_000];
            let gathered_large = end.all_gather(&large).unwrap();
            let mut sums = [u64::MAX, u64::from(rank), 7];
            end.all_reduce(&mut sums, Reduction::Sum).unwrap();
            let mut maxima = [u64::from(rank), 5 - u64::from(rank)];
            end.all_reduce(&mut maxima, Reduction::Max).unwrap();
            assert_eq!(end.all_gather(&[]), Ok(vec![]));
            (gathered, gathered_large, sums, maxima)
        });
        let of = u64::from(ranks);
        for (gathered, large, sums, maxima) in seen {
            for (step, gathered) in (0..).zip(gathered) {
                let expected: Vec<u8> = (0..u8::try_from(ranks).unwrap()).flat_map(|rank| [rank, step]).collect();
                assert_eq!(gathered, expected);
            }
            assert!(large.chunks(300_000).zip(0u8..).all(|(part, rank)| part.iter().all(|&byte| byte == rank)));
            assert_eq!(sums, [0u64.wrapping_sub(of), of * (of - 1) / 2, 7 * of]);
            assert_eq!(maxima, [of - 1, 5]);
        }
    }
}

/// Whoever it is, all others hear who it was.
#[test]
fn a_rank_that_is_gone_or_late_is_named_on_all() {
    let deadline = Duration::from_millis(300);
    for odd in 0..3 {
        for is_late in [false, true] {
            let begun = Instant::now();
            let errors = on_ranks(3, deadline, |rank, end| {
                end.all_gather(&[1]).unwrap();
                if rank == odd {
                    // The others are told, and have given up, before it comes.
                    thread::sleep(if is_late { 4 * deadline } else { Duration::ZERO });
                    return None;
                }
                let first = end.all_gather(&[2]).unwrap_err().to_string();
                // And all later calls say the same.
                assert_eq!(end.all_gather(&[3]).unwrap_err().to_string(), first);
                Some(first)
            });
            let expected = if is_late {
                format!("the ranks cannot communicate: rank {odd} has not come within 300ms")
            } else {
                format!("the ranks cannot communicate: rank {odd} is gone")
            };
            for (rank, error) in (0..).zip(errors) {
                assert_eq!(error, (rank != odd).then(|| expected.clone()), "rank {rank}, odd {odd}");
            }
            assert!(begun.elapsed() < 20 * deadline);
        }
    }
}

#[test]
fn ranks_that_come_with_other_lengths_hear_of_it() {
    let errors = on_ranks(3, LONG, |rank, end| end.all_gather(&vec![0; if rank == 2 { 9 } else { 4 }]).unwrap_err());
    for error in errors {
        assert_eq!(error.to_string(), "the ranks cannot communicate: rank 2 gave 9 bytes, rank 0 4");
    }
}

#[test]
fn an_abort_ends_all_waiting() {
    let errors = on_ranks(2, LONG, |rank, end| {
        if rank == 1 {
            thread::sleep(Duration::from_millis(200));
            end.abort();
        }
        end.all_gather(&[1]).unwrap_err().to_string()
    });
    assert_eq!(errors[0], "the ranks cannot communicate: rank 1 is gone");
    assert_eq!(errors[1], "the ranks cannot communicate: rank 0 is gone");
}

/// Strangers are sent away, and ranks that do not belong together hear it.
#[test]
fn who_is_none_of_the_ranks_is_none() {
    let come = |peers: &[(u32, u32)], stranger: bool| -> Vec<Result<(), Error>> {
        let address = free();
        let deadline = Duration::from_millis(if peers.len() < 2 { 300 } else { 5000 });
        thread::scope(|scope| {
            let of = |(rank, ranks)| move || TcpCommunicator::with_deadline(address, rank, ranks, deadline);
            let listens = scope.spawn(of((0, 3)));
            if stranger {
                let mut stream = loop {
                    if let Ok(stream) = TcpStream::connect(address) {
                        break stream;
                    }
                };
                stream.write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n").unwrap();
            }
            let others: Vec<_> = peers.iter().map(|&peer| scope.spawn(of(peer))).collect();
            let made: Vec<Result<TcpCommunicator, Error>> =
                [listens].into_iter().chain(others).map(|thread| thread.join().unwrap()).collect();
            // A connection is made before it is known what becomes of it.
            let ask = |end: TcpCommunicator| scope.spawn(move || end.all_gather(&[]).map(drop));
            let asked: Vec<_> = made.into_iter().map(|end| end.map(ask)).collect();
            asked.into_iter().map(|asked| asked.and_then(|thread| thread.join().unwrap())).collect()
        })
    };
    let text = |results: Vec<Result<(), Error>>| -> Vec<String> {
        results
            .into_iter()
            .map(|result| result.map_or_else(|error| error.to_string(), |()| "well".to_owned()))
            .collect()
    };
    assert_eq!(text(come(&[(1, 3), (2, 3)], true)), ["well"; 3]);
    let other = "the ranks cannot communicate: rank 2 is of 4 ranks, and rank 0 of 3";
    assert_eq!(text(come(&[(2, 4)], false)), [other; 2]);
    let missing = "the ranks cannot communicate: rank 1 has not come within 300ms";
    assert_eq!(text(come(&[(2, 3)], false)), [missing; 2]);
    let twice = text(come(&[(1, 3), (1, 3)], false));
    assert!(
        twice.iter().all(|error| error.ends_with("there are two of rank 1") || error.ends_with("rank 0 is gone")),
        "{twice:?}"
    );
    let refused = TcpCommunicator::new(free(), 3, 3).unwrap_err();
    assert_eq!(refused.to_string(), "the ranks cannot communicate: there is no rank 3 of 3");
}

/// The example, as its user runs it.
#[test]
fn processes_train_with_the_same_bits_and_say_whose_fault_it_was() {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("examples/ranks");
    assert!(program.exists(), "{} is missing: cargo build --example ranks", program.display());
    let output = Command::new(program).args(["--ranks", "3", "--steps", "6"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let count = |what: &str| text.lines().filter(|line| line.contains(what)).count();
    assert_eq!((count("with the same bits on 3 ranks"), count("other bits")), (6, 0), "{text}");
    assert_eq!((count("skipped"), count("replicas differ in step 3 on rank 1, in weight")), (1, 3), "{text}");
    assert_eq!(count("the ranks cannot communicate: rank 2 is gone"), 2, "{text}");
}
