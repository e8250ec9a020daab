//! The page in Chromium: it runs without an error, shows the numbers of the run, is narrow enough for a phone and has two themes.

use crate::{Folder, Page, lines, require, steps};
use gradprobe::write::json_line;
use std::{
    fs::{self, File},
    io::BufReader,
    path::PathBuf,
    process::{Command, Output},
};

/// Chromium, if it is on PATH.
fn chromium() -> Option<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|folder| folder.join("chromium")).find(|path| path.is_file());
    if found.is_none() {
        require::skipped(require::CHROMIUM, "there is no chromium on PATH");
    }
    found
}

/// Opens a page, and sees to it that its console has nothing to say.
#[track_caller]
fn open(chromium: &PathBuf, folder: &Folder, page: &Page, options: &[&str]) -> Output {
    let profile = format!("--user-data-dir={}", folder.path("profile").display());
    let output = Command::new(chromium)
        // No sandbox: it is missing in containers, and the page is ours. Time that is not real does not wait for timers.
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            &profile,
        ])
        .args(options)
        .arg(format!("file://{}", page.path.display()))
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !log.contains("CONSOLE"), "{log}");
    output
}

/// A copy of a page with a script that moves through it.
fn driven(folder: &Folder, page: &Page, script: &str) -> Page {
    let text = page.text.replace("</body>", &format!("<script>{script}</script></body>"));
    let path = folder.path("driven.html");
    fs::write(&path, &text).unwrap();
    Page { path, text }
}

/// An attribute of the root element.
#[track_caller]
fn seen<'a>(dom: &'a str, name: &str) -> &'a str {
    let (_, rest) =
        dom.split_once(&format!("data-{name}=\"")).unwrap_or_else(|| panic!("no {name} in {}", &dom[..300]));
    rest.split_once('"').unwrap().0
}

const KEYS: &str = r##"
const root = document.documentElement.dataset;
const canvas = document.querySelector("#tensors canvas[tabindex]");
canvas.focus();
const press = (on, key) => on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const readout = () => document.querySelector("#tensors .readout").textContent;
root.end = readout();
["Home", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"].forEach((key) => press(canvas, key));
root.cell = readout();
press(canvas, "Enter");
root.chosen = document.querySelector("[data-tensor]").dataset.tensor;
root.norm = document.querySelector("[data-number=l2_norm]").textContent;
root.address = location.hash;
document.getElementById("measure").value = "dead_share";
document.getElementById("measure").dispatchEvent(new Event("change"));
press(canvas, "ArrowLeft");
root.dead = readout();
document.getElementById("filter").value = "H.4";
document.getElementById("filter").dispatchEvent(new Event("input"));
press(canvas, "End");
root.filtered = readout();
const curve = document.querySelector("[data-curve=loss]").nextElementSibling;
curve.focus();
["Home", "ArrowRight", "ArrowRight", "ArrowRight"].forEach((key) => press(curve, key));
setTimeout(() => { root.curve = curve.querySelector(".u-legend").textContent; }, 1000);
"##;

#[test]
fn numbers_are_shown_and_keys_move_through_them() {
    let Some(chromium) = chromium() else { return };
    let (folder, entries) = (Folder::new(), steps());
    let page = folder.page(&[&folder.run("run", &lines(&entries))]);
    let page = driven(&folder, &page, KEYS);
    let dom = open(&chromium, &folder, &page, &["--dump-dom"]).stdout;
    let dom = String::from_utf8(dom).unwrap();
    for part in [
        "<title>run – gradprobe report</title>",
        "data-fact=\"steps\" data-value=\"40\">40, from 1 to 40<",
        "data-fact=\"loss\" data-value=\"0.025\">1 at first, 0.025 at last<",
        "data-verdict=\"critical\">▲ critical<",
        "data-fact=\"not finite\" data-value=\"11\">11 steps<",
    ] {
        assert!(dom.contains(part), "{part}");
    }
    let record = |step: usize, tensor: usize| entries[step - 1].report().records()[tensor];
    // Norms have five digits on the page.
    let norm = |step: usize, tensor: usize| format!("{:.4e}", record(step, tensor).l2_norm()).parse::<f64>().unwrap();
    let told = |text: &str| text.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap();
    assert_eq!(told(seen(&dom, "end")), norm(40, 0));
    let cell = seen(&dom, "cell");
    assert!(cell.starts_with("step 3: h.2.weight, L2 norm "), "{cell}");
    assert_eq!(told(cell), norm(3, 2));
    assert_eq!(seen(&dom, "chosen"), "h.2.weight");
    assert_eq!(seen(&dom, "address"), "#tensor=h.2.weight");
    // With all its digits.
    assert_eq!(seen(&dom, "norm").parse(), Ok(record(40, 2).l2_norm()));
    assert_eq!(seen(&dom, "dead"), "step 2: h.2.weight, dead share 0");
    assert_eq!(seen(&dom, "filtered"), "step 40: h.4.weight, dead share 1");
    assert!(seen(&dom, "curve").starts_with("step4loss0.25"), "{}", seen(&dom, "curve"));
}

#[test]
fn both_themes_and_a_phone_have_room() {
    let Some(chromium) = chromium() else { return };
    let (folder, entries) = (Folder::new(), steps());
    let healthy: Vec<String> = entries[..29].iter().map(json_line).collect();
    let page = folder.page(&[&folder.run("run", &lines(&entries)), &folder.run("healthy", &healthy)]);
    // An element that is wider than the window turns the page red. (Chromium prints the elements of no window below 500 pixels.)
    let script = "const { scrollWidth, clientWidth } = document.documentElement;
        const isCut = (it) => it.getBoundingClientRect().right > clientWidth && !it.closest('.scroll, .u-wrap');
        const isWide = scrollWidth > innerWidth || Array.from(document.querySelectorAll('main *')).some(isCut);
        if (isWide) document.body.style.background = 'red';";
    let page = driven(&folder, &page, script);
    for (theme, background) in [("light", [0xf6, 0xf7, 0xf9]), ("dark", [0x12, 0x14, 0x17])] {
        for (width, height) in [(360, 740), (1200, 900)] {
            let picture = folder.path(&format!("{theme}-{width}.png"));
            let size = format!("--window-size={width},{height}");
            let dark: &[&str] = if theme == "dark" { &["--force-dark-mode"] } else { &[] };
            let picture_option = format!("--screenshot={}", picture.display());
            open(&chromium, &folder, &page, &[&[&size, &picture_option, "--hide-scrollbars"], dark].concat());
            let mut reader = png::Decoder::new(BufReader::new(File::open(&picture).unwrap())).read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            let info = reader.next_frame(&mut pixels).unwrap();
            assert_eq!((info.width, pixels[..3].to_vec()), (width, background.to_vec()), "{theme} {width}");
        }
    }
}
