//! The view on a terminal, with a thread of its own.

use super::View;
use crate::{
    Error, Plan,
    write::{Entry, Sink},
};
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
};
use std::{
    io::{self, IsTerminal},
    sync::mpsc::{SyncSender, TryRecvError, sync_channel},
    thread::{self, JoinHandle},
    time::Duration,
};

/// Shows the view on the terminal at standard output while the program runs: a sink like the others. Arrow and page
/// keys move the list of tensors; `q` closes the view and lets the program go on.
///
/// The terminal is given back by [`finish`](Sink::finish), when this is dropped, and when any thread panics. Meanwhile,
/// prints to the terminal cannot be seen: print to standard error, redirected to a file.
#[derive(Debug)]
pub struct Live {
    entries: Option<SyncSender<Entry>>,
    thread: Option<JoinHandle<Result<(), Error>>>,
    error: Option<Error>,
}

/// The longest wait of a key.
const PATIENCE: Duration = Duration::from_millis(50);

impl Live {
    /// Takes the terminal over. Meanwhile Ctrl-C is a key and no signal: the view closes and calls `on_interrupt` on
    /// its thread. `|| std::process::exit(130)` does as Ctrl-C without a view.
    ///
    /// # Errors
    /// [`Error::NoTerminal`] when standard output is no terminal, [`Error::Thread`].
    pub fn start(plan: &Plan, on_interrupt: impl FnOnce() + Send + 'static) -> Result<Self, Error> {
        let terminal = terminal()?;
        let (entries, queue) = sync_channel(4);
        let mut view = View::new(plan);
        let work = move || {
            let shown = show(terminal, &mut view, |view| {
                loop {
                    match queue.try_recv() {
                        Ok(entry) => view.update(&entry)?,
                        Err(TryRecvError::Empty) => return Ok(End::NotYet),
                        Err(TryRecvError::Disconnected) => return Ok(End::Done),
                    }
                }
            });
            let restored = ratatui::try_restore().map_err(|error| refused(&error));
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
            Some(Ok(Err(error))) => self.error = Some(error),
            Some(Err(_)) => self.error = Some(Error::Thread { reason: "the view panicked".to_owned() }),
        }
    }
}

impl Sink for Live {
    /// Shows a step. When four steps are waiting, the new one is left out.
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

/// Takes the terminal at standard output over, and shows the view until `feed` fails or the user closes it, with `q` or
/// Ctrl-C. `feed` gives the view new steps. It is called before each drawing, some 20 times a second, and keys wait for
/// it. Keys are those of [`Live`].
///
/// # Errors
/// [`Error::NoTerminal`], and those of `feed`.
pub fn follow<E: From<Error>>(mut view: View, mut feed: impl FnMut(&mut View) -> Result<(), E>) -> Result<(), E> {
    let shown = show(terminal()?, &mut view, |view| feed(view).map(|()| End::NotYet));
    ratatui::try_restore().map_err(|error| refused(&error))?;
    shown.map(drop)
}

fn refused(reason: &impl ToString) -> Error {
    Error::NoTerminal { reason: reason.to_string() }
}

/// Takes the terminal over.
fn terminal() -> Result<DefaultTerminal, Error> {
    if !io::stdout().is_terminal() {
        return Err(refused(&"standard output is redirected"));
    }
    ratatui::try_init().map_err(|error| {
        // A part of it may have been done.
        let _ = ratatui::try_restore();
        refused(&error)
    })
}

/// The end of a view.
enum End {
    NotYet,
    Done,
    Interrupted,
}

/// Draws until `feed` ends or the user quits.
fn show<E: From<Error>>(
    mut terminal: DefaultTerminal,
    view: &mut View,
    mut feed: impl FnMut(&mut View) -> Result<End, E>,
) -> Result<End, E> {
    let failed = |error: io::Error| E::from(refused(&error));
    loop {
        if matches!(feed(view)?, End::Done) {
            return Ok(End::Done);
        }
        terminal.draw(|frame| view.draw(frame)).map_err(failed)?;
        if !event::poll(PATIENCE).map_err(failed)? {
            continue;
        }
        let Event::Key(key) = event::read().map_err(failed)? else { continue };
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
