//! The view on a terminal of its own thread.

use super::View;
use crate::{
    Error, Plan,
    write::{Entry, Sink},
};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use std::{
    io::{self, IsTerminal},
    sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    thread::{self, JoinHandle},
    time::Duration,
};

/// The view on the terminal at standard output, while the program runs: a sink like the others. Arrow and page keys move
/// the list of tensors; `q` closes the view and lets the program go on.
///
/// The terminal is given back by [`finish`](Sink::finish), when this is dropped, and when any thread panics. What the
/// program prints to the terminal meanwhile is lost to the eye: print to standard error, redirected to a file.
#[derive(Debug)]
pub struct Live {
    entries: Option<SyncSender<Entry>>,
    thread: Option<JoinHandle<io::Result<()>>>,
    error: Option<Error>,
}

/// How long a key waits at most.
const PATIENCE: Duration = Duration::from_millis(50);

impl Live {
    /// Takes the terminal over. As long as it is taken, Ctrl-C is a key and no signal; the view then closes and calls
    /// `on_interrupt` on its thread. `|| std::process::exit(130)` is what Ctrl-C does without a view.
    ///
    /// # Errors
    /// [`Error::NoTerminal`] when standard output is none, [`Error::Thread`].
    pub fn start(plan: &Plan, on_interrupt: impl FnOnce() + Send + 'static) -> Result<Self, Error> {
        let refused = |reason: String| Error::NoTerminal { reason };
        if !io::stdout().is_terminal() {
            return Err(refused("standard output is redirected".to_owned()));
        }
        let terminal = ratatui::try_init().map_err(|error| {
            // Half of it may have been done.
            let _ = ratatui::try_restore();
            refused(error.to_string())
        })?;
        let (entries, queue) = sync_channel(4);
        let mut view = View::new(plan);
        let work = move || {
            let shown = show(terminal, &mut view, &queue);
            let restored = ratatui::try_restore();
            if matches!(shown, Ok(End::Interrupted)) {
                on_interrupt();
            }
            shown.map(drop).and(restored)
        };
        let thread = thread::Builder::new().name("gradprobe-live".to_owned()).spawn(work).map_err(|error| {
            let _ = ratatui::try_restore();
            Error::Thread { reason: error.to_string() }
        })?;
        Ok(Self { entries: Some(entries), thread: Some(thread), error: None })
    }

    fn join(&mut self) {
        self.entries = None;
        match self.thread.take().map(JoinHandle::join) {
            None | Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => self.error = Some(Error::NoTerminal { reason: error.to_string() }),
            Some(Err(_)) => self.error = Some(Error::Thread { reason: "the view panicked".to_owned() }),
        }
    }
}

impl Sink for Live {
    /// Shows a step; one that comes before the last four are shown is left out.
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        if let Some(entries) = &self.entries {
            // Full, or closed by its user.
            let _ = entries.try_send(entry.without_histogram());
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.join();
        self.error.take().map_or(Ok(()), Err)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.join();
    }
}

enum End {
    Done,
    Interrupted,
}

/// Draws until there are no more entries or the user has enough.
fn show(mut terminal: ratatui::DefaultTerminal, view: &mut View, queue: &Receiver<Entry>) -> io::Result<End> {
    loop {
        loop {
            match queue.try_recv() {
                Ok(entry) => view.update(&entry).map_err(io::Error::other)?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(End::Done),
            }
        }
        terminal.draw(|frame| view.draw(frame))?;
        if !event::poll(PATIENCE)? {
            continue;
        }
        let Event::Key(key) = event::read()? else { continue };
        if key.kind == KeyEventKind::Release {
            continue;
        }
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(End::Interrupted),
            KeyCode::Char('q') | KeyCode::Esc => return Ok(End::Done),
            KeyCode::Up => view.scroll(-1),
            KeyCode::Down => view.scroll(1),
            KeyCode::PageUp => view.scroll(-20),
            KeyCode::PageDown => view.scroll(20),
            KeyCode::Home => view.scroll(isize::MIN),
            _ => {}
        }
    }
}
