//! Ranks that are processes, connected by TCP.

use super::{DEADLINE, LONGEST_WAIT, Reduction, Transport, odd_length};
use crate::{Error, probe::values};
use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Connects processes on one machine or on several: for trying ranks out, and for training on CPUs. All exchange passes
/// through rank 0, which is fine for a dozen of them.
///
/// There is no encryption, and any process that reaches the address may connect first: for trusted networks.
///
/// ```no_run
/// use gradprobe::ranks::TcpCommunicator;
///
/// # let (rank, ranks) = (0, 2);
/// let address = "127.0.0.1:29500";
/// let communicator = TcpCommunicator::new(address, rank, ranks)?; // on each rank
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Debug)]
pub struct TcpCommunicator {
    rank: u32,
    ranks: u32,
    deadline: Duration,
    links: Mutex<Links>,
    /// The same connections, for an abort to close.
    handles: Vec<TcpStream>,
}

#[derive(Debug)]
struct Links {
    /// On rank 0 the connections to the others, in their order; on the others the one to rank 0.
    streams: Vec<TcpStream>,
    /// The reason for which every further call fails.
    over: Option<String>,
}

/// The first word on a connection.
const GREETING: u64 = u64::from_le_bytes(*b"gradprb1");
/// Stands for a length before an error message.
const WRONG: u64 = u64::MAX;
/// The limit of a message. A larger length comes from another program.
const LONGEST: u64 = 1 << 36;

impl TcpCommunicator {
    /// Connects rank `rank` of `ranks`. Rank 0 listens at the address, and all others connect to it, within ten
    /// minutes.
    ///
    /// # Errors
    /// [`Error::Communication`].
    pub fn new(address: impl ToSocketAddrs, rank: u32, ranks: u32) -> Result<Self, Error> {
        Self::with_deadline(address, rank, ranks, DEADLINE)
    }

    /// Does the same with another deadline for other ranks, in each call. After that every call fails, on all ranks.
    ///
    /// # Errors
    /// [`Error::Communication`].
    pub fn with_deadline(
        address: impl ToSocketAddrs,
        rank: u32,
        ranks: u32,
        deadline: Duration,
    ) -> Result<Self, Error> {
        let deadline = deadline.min(LONGEST_WAIT);
        if rank >= ranks {
            return Err(Error::Communication { what: format!("there is no rank {rank} of {ranks}") });
        }
        let streams =
            if rank == 0 { listen(address, ranks, deadline)? } else { vec![connect(address, rank, ranks, deadline)?] };
        let wrong = |error: io::Error| Error::Communication { what: error.to_string() };
        for stream in &streams {
            stream.set_nodelay(true).map_err(wrong)?;
            // The others wait for rank 0, which waits for the slowest.
            let patience = if rank == 0 { deadline } else { 2 * deadline };
            stream.set_read_timeout(Some(patience)).map_err(wrong)?;
            stream.set_write_timeout(Some(patience)).map_err(wrong)?;
        }
        let handles = streams.iter().map(TcpStream::try_clone).collect::<Result<_, _>>().map_err(wrong)?;
        Ok(Self { rank, ranks, deadline, links: Mutex::new(Links { streams, over: None }), handles })
    }

    /// Gives every rank the result of `all` from the messages of all ranks.
    fn exchange(&self, own: &[u8], all: impl FnOnce(&[Vec<u8>]) -> Vec<u8>) -> Result<Vec<u8>, Error> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(what) = links.over.clone() {
            return Err(Error::Communication { what });
        }
        let exchanged = if self.rank == 0 {
            self.serve(&mut links.streams, own, all)
        } else {
            self.ask(&mut links.streams[0], own)
        };
        exchanged.map_err(|what| {
            links.over = Some(what.clone());
            Error::Communication { what }
        })
    }

    fn serve(
        &self,
        streams: &mut [TcpStream],
        own: &[u8],
        all: impl FnOnce(&[Vec<u8>]) -> Vec<u8>,
    ) -> Result<Vec<u8>, String> {
        let mut parts = vec![own.to_vec()];
        let (mut wrong, until) = (None, Instant::now() + self.deadline);
        for (rank, stream) in (1..).zip(streams.iter_mut()) {
            // Ranks after a missing one are read as well: closing a connection with unread bytes would discard the
            // answer.
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(50));
            match stream.set_read_timeout(Some(left)).and_then(|()| receive(stream)) {
                Ok(part) => parts.push(part),
                Err(error) => {
                    wrong.get_or_insert(self.named(rank, &error));
                }
            }
        }
        let wrong = wrong.or_else(|| odd_length(parts.iter().map(Vec::len)));
        let answer = match &wrong {
            Some(what) => framed(WRONG, what.as_bytes()),
            None => {
                let all = all(&parts);
                framed(all.len() as u64, &all)
            }
        };
        let mut failed = wrong;
        for (rank, stream) in (1..).zip(streams.iter_mut()) {
            if let Err(error) = stream.write_all(&answer) {
                failed.get_or_insert(self.named(rank, &error));
            }
        }
        failed.map_or_else(|| Ok(answer[8..].to_vec()), Err)
    }

    fn ask(&self, stream: &mut TcpStream, own: &[u8]) -> Result<Vec<u8>, String> {
        let sent = stream.write_all(&framed(own.len() as u64, own)).and_then(|()| receive(stream));
        sent.map_err(|error| match error.get_ref() {
            // The error that rank 0 has found.
            Some(what) if error.kind() == io::ErrorKind::Other => what.to_string(),
            _ => self.named(0, &error),
        })
    }

    fn named(&self, rank: u32, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("rank {rank} has not come within {:?}", self.deadline)
            }
            io::ErrorKind::Other | io::ErrorKind::InvalidData => format!("rank {rank} {error}"),
            _ => format!("rank {rank} is gone"),
        }
    }
}

/// Gives a length, or [`WRONG`], and bytes.
fn framed(head: u64, bytes: &[u8]) -> Vec<u8> {
    [&head.to_le_bytes(), bytes].concat()
}

fn word(stream: &mut TcpStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Reads a message; an error message becomes an error.
fn receive(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = word(stream)?;
    if length == WRONG {
        let mut text = String::new();
        stream.take(4096).read_to_string(&mut text)?;
        return Err(io::Error::other(text));
    }
    if length > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "sends something else than ranks do"));
    }
    let mut bytes = Vec::new();
    stream.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Accepts the connections of ranks 1 and up.
fn listen(address: impl ToSocketAddrs, ranks: u32, deadline: Duration) -> Result<Vec<TcpStream>, Error> {
    let wrong = |error: io::Error| Error::Communication { what: format!("rank 0 cannot listen: {error}") };
    let listener = TcpListener::bind(address).map_err(wrong)?;
    listener.set_nonblocking(true).map_err(wrong)?;
    let mut streams: Vec<Option<TcpStream>> = (1..ranks).map(|_| None).collect();
    let until = Instant::now() + deadline;
    while let Some(missing) = streams.iter().position(Option::is_none) {
        match listener.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false).map_err(wrong)?;
                stream.set_read_timeout(Some(Duration::from_secs(1))).map_err(wrong)?;
                // A connection with another greeting is no rank.
                let greeting = [(); 3].map(|()| word(&mut stream).unwrap_or(u64::MAX));
                let place = usize::try_from(greeting[1].wrapping_sub(1)).unwrap_or(usize::MAX);
                if greeting[0] != GREETING || place >= streams.len() {
                    continue;
                }
                if greeting[2] != u64::from(ranks) || streams[place].is_some() {
                    let what = if streams[place].is_some() {
                        format!("there are two of rank {}", greeting[1])
                    } else {
                        format!("rank {} is of {} ranks, and rank 0 of {ranks}", greeting[1], greeting[2])
                    };
                    for stream in streams.iter_mut().flatten().chain([&mut stream]) {
                        let _ = stream.write_all(&framed(WRONG, what.as_bytes()));
                    }
                    return Err(Error::Communication { what });
                }
                streams[place] = Some(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= until {
                    let what = format!("rank {} has not come within {deadline:?}", missing + 1);
                    for stream in streams.iter_mut().flatten() {
                        let _ = stream.write_all(&framed(WRONG, what.as_bytes()));
                    }
                    return Err(Error::Communication { what });
                }
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(wrong(error)),
        }
    }
    Ok(streams.into_iter().flatten().collect())
}

/// Connects to rank 0, which may start later.
fn connect(address: impl ToSocketAddrs, rank: u32, ranks: u32, deadline: Duration) -> Result<TcpStream, Error> {
    let until = Instant::now() + deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let first =
            address.to_socket_addrs().and_then(|mut all| all.next().ok_or_else(|| io::ErrorKind::NotFound.into()));
        match first.and_then(|address| TcpStream::connect_timeout(&address, left)) {
            Ok(mut stream) => {
                let greeting = [GREETING, rank.into(), ranks.into()].map(u64::to_le_bytes).concat();
                let sent = stream.write_all(&greeting);
                return sent.map(|()| stream).map_err(|_| Error::Communication { what: "rank 0 is gone".to_owned() });
            }
            Err(error) if Instant::now() >= until => {
                return Err(Error::Communication { what: format!("rank 0 has not come within {deadline:?}: {error}") });
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

impl Transport for TcpCommunicator {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn ranks(&self) -> u32 {
        self.ranks
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>, Error> {
        self.exchange(own, |parts| parts.concat())
    }

    /// Rank 0 adds up, and sends only the sum.
    fn all_reduce(&self, words: &mut [u64], reduction: Reduction) -> Result<(), Error> {
        let reduced = self.exchange(bytemuck::cast_slice(words), |parts| {
            let mut all: Vec<u64> = values(&parts[0]);
            for part in &parts[1..] {
                for (word, other) in all.iter_mut().zip(values::<u64>(part)) {
                    *word = reduction.of(*word, other);
                }
            }
            bytemuck::cast_slice(&all).to_vec()
        })?;
        let reduced: Vec<u64> = values(&reduced);
        if reduced.len() != words.len() {
            let what = format!("{} words came of all ranks, and not {}", reduced.len(), words.len());
            return Err(Error::Communication { what });
        }
        words.copy_from_slice(&reduced);
        Ok(())
    }

    fn abort(&self) {
        for stream in &self.handles {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
