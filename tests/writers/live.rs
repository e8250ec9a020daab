//! The view in the terminal, drawn into memory, and run in a pseudoterminal.

use crate::entries::{NAMES, deep, entries};
use gradprobe::write::live::ratatui::{Terminal, backend::TestBackend, buffer::Buffer, style::Color};
use gradprobe::{
    Error, Plan,
    write::{
        Entry,
        live::{Live, View},
    },
};
use std::path::Path;

fn plan(entry: &Entry) -> Plan {
    entry.report().plan().clone()
}

/// What a view shows of these steps.
fn drawn(entries: &[Entry], width: u16, height: u16, scroll: isize) -> Buffer {
    let mut view = View::new(&plan(&entries[0]));
    entries.iter().for_each(|entry| view.update(entry).unwrap());
    view.scroll(scroll);
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view.draw(frame)).unwrap();
    terminal.backend().buffer().clone()
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let width = usize::from(buffer.area.width);
    buffer.content.chunks(width).map(|row| row.iter().map(|cell| cell.symbol()).collect()).collect()
}

/// The line with this text, and the colour of its first letter.
#[track_caller]
fn find(buffer: &Buffer, text: &str) -> (String, Color) {
    let lines = lines(buffer);
    let row = lines.iter().position(|line| line.contains(text));
    let row = row.unwrap_or_else(|| panic!("{text} is not in\n{}", lines.join("\n")));
    let column = lines[row][..lines[row].find(text).unwrap()].chars().count();
    let cell = &buffer.content[row * usize::from(buffer.area.width) + column];
    (lines[row].clone(), cell.fg)
}

#[test]
fn the_worst_come_first_with_norm_change_and_dead_share() {
    let entries = entries(5);
    let buffer = drawn(&entries, 120, 48, 0);
    let (header, _) = find(&buffer, " step 5 ");
    assert!(header.contains("total norm NaN") && header.contains("to be skipped"), "{header}");
    assert!(header.contains("not finite in 5 of the last 5 steps"), "{header}");
    let rows = lines(&buffer);
    let place = |name: &str| rows.iter().position(|line| line.contains(name) && !line.contains("norm")).unwrap();
    // Critical, warning, healthy; odd names in one line each.
    assert!(place(r"two\nlines\r\nand\n") < place("a \"quoted\", name"));
    assert!(
        place("größe–∇∥") < place("a \"quoted\", name") && place("a \"quoted\", name") < place("blocks.0.attn/weight")
    );
    let (row, colour) = find(&buffer, "healthy ");
    let norm = entries[4].report().records()[0].l2_norm();
    let change = norm / entries[3].report().records()[0].l2_norm();
    for part in ["blocks.0.attn/weight".to_owned(), format!("{norm:.3e}"), format!("×{change:.3}"), "0.00".to_owned()]
    {
        assert!(row.contains(&part), "{part} is not in {row}");
    }
    assert_eq!(colour, Color::Green);
    assert_eq!(find(&buffer, r"critical two\nlines").1, Color::Red);
    let (zeros, colour) = find(&buffer, "warning  a \"quoted\"");
    assert!(zeros.contains("0.000e0") && zeros.contains("100.00") && zeros.contains("all zero"), "{zeros}");
    assert_eq!(colour, Color::Yellow);
    let (not_finite, _) = find(&buffer, "größe–∇∥");
    assert!(not_finite.contains("NaN") && not_finite.contains("first at 1"), "{not_finite}");
}

#[test]
fn findings_come_with_advice_once() {
    let buffer = drawn(&entries(2), 120, 48, 0);
    let (_, colour) = find(&buffer, "critical exploding");
    assert_eq!(colour, Color::Red);
    find(&buffer, r#"warning exploding a "quoted", name: norm NaN is above"#);
    let advice = lines(&buffer).iter().filter(|line| line.contains("→ lower the learning rate; clip, harder")).count();
    assert_eq!(advice, 1);
}

#[test]
fn the_curve_leaves_out_what_is_not_finite_and_marks_it() {
    let entries = deep(6, 30, 29..=30, |layer| format!("layer {layer}"));
    let is_dot = |c: char| ('\u{2801}'..='\u{28ff}').contains(&c);
    let healthy = drawn(&entries[..28], 100, 36, 0);
    let bad = drawn(&entries, 100, 36, 0);
    for buffer in [&healthy, &bad] {
        assert!(lines(buffer).concat().chars().filter(|&c| is_dot(c)).count() > 30);
        find(buffer, "1e0");
    }
    let magenta = |buffer: &Buffer| {
        buffer.content.iter().filter(|cell| cell.fg == Color::Magenta && cell.symbol() == "█").count()
    };
    assert_eq!((magenta(&healthy), magenta(&bad)), (0, 2));
}

#[test]
fn a_run_that_begins_anew_has_a_curve_of_its_own() {
    let (header, _) = find(&drawn(&[entries(5), entries(2)].concat(), 120, 48, 0), " step 2 ");
    assert!(header.contains("not finite in 2 of the last 2 steps"), "{header}");
}

#[test]
fn a_thousand_tensors_can_be_scrolled_through() {
    let entries = deep(1000, 2, 2..=2, |layer| format!("layer {layer} of many"));
    let top = drawn(&entries, 100, 40, 0);
    assert!(find(&top, "layer 1 of").0.contains("critical") && find(&top, "layer 998 of").0.contains("warning"));
    find(&top, "tensors 1 to 1000");
    let down = drawn(&entries, 100, 40, 500);
    find(&down, "tensors 501 to 1000");
    find(&down, "layer 499 of");
    find(&drawn(&entries, 100, 40, isize::MAX), "tensors 1000 to 1000");
}

#[test]
fn every_size_and_no_step_at_all_can_be_drawn() {
    let entries = entries(4);
    for (width, height) in [(1, 1), (3, 40), (200, 2), (20, 10), (300, 100)] {
        drawn(&entries, width, height, 1);
    }
    let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
    let view = View::new(&plan(&entries[0]));
    terminal.draw(|frame| view.draw(frame)).unwrap();
    assert!(find(terminal.backend().buffer(), "step 0").0.contains("total norm –"));
    assert_eq!(NAMES.len(), entries[0].tensors().count());
}

#[test]
fn a_step_of_other_tensors_is_refused() {
    let mut view = View::new(&plan(&entries(1)[0]));
    let other = deep(2, 1, 2..=2, |layer| layer.to_string());
    let refused = view.update(&other[0]).unwrap_err();
    assert!(matches!(refused, Error::EntryOfAnotherPlan { entry: "view", .. }), "{refused}");
}

/// Runs `monitor --live` in a pseudoterminal, types `keys` at step 5, and gives what a terminal was sent and the exit status;
/// none without Python.
#[cfg(unix)]
fn in_a_terminal(keys: &str) -> Option<(String, i64)> {
    let test = std::env::current_exe().unwrap();
    let monitor = test.parent().and_then(Path::parent).unwrap().join("examples/monitor");
    assert!(monitor.exists(), "{} is missing: cargo build --example monitor", monitor.display());
    let folder = tempfile::tempdir().unwrap();
    crate::terminal::run(&[monitor.as_path(), folder.path(), Path::new("--live")], "layers.3", keys)
}

/// Leaves the alternate screen.
#[cfg(unix)]
const RESTORED: &str = "\u{1b}[?1049l";

#[cfg(unix)]
#[test]
fn a_view_that_is_closed_lets_the_program_end_as_it_would() {
    let Some((sent, status)) = in_a_terminal("q") else { return };
    let (view, after) = sent.split_once(RESTORED).expect("the terminal is given back");
    assert!(view.contains("verdict") && view.contains("layers.3.weight"));
    assert!(after.contains("110 steps, 0 of them dropped") && after.contains("steps.jsonl"), "{after}");
    assert_eq!(status, 0);
}

#[cfg(unix)]
#[test]
fn an_interrupt_gives_the_terminal_back_and_ends_the_program() {
    let Some((sent, status)) = in_a_terminal("\u{3}") else { return };
    assert!(sent.contains(RESTORED) && !sent.contains("110 steps"));
    assert_eq!(status, 130);
}

#[test]
fn without_a_terminal_the_view_says_so() {
    use std::io::IsTerminal;
    if std::io::stdout().is_terminal() {
        crate::require::pointless("standard output is a terminal");
        return;
    }
    let error = Live::start(&plan(&entries(1)[0]), || ()).unwrap_err();
    assert_eq!(error.to_string(), "no terminal: standard output is redirected");
}
