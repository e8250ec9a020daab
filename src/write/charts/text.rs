//! Text in pictures: one monospaced font, so that the width of a label is known before it is drawn.

use super::Drawn;
use crate::Error;
use plotters::{
    coord::Shift,
    prelude::*,
    style::{
        FontTransform,
        text_anchor::{HPos, Pos, VPos},
    },
};
use std::sync::OnceLock;

/// Heights of a line, in pixels.
pub const TITLE: i32 = 20;
pub const HEADING: i32 = 16;
pub const SMALL: i32 = 13;
pub const TINY: i32 = 11;
/// Nearly black.
pub const DARK: RGBColor = RGBColor(0x22, 0x22, 0x22);
pub const GREY: RGBColor = RGBColor(0x66, 0x66, 0x66);
/// Lines behind the data.
pub const PALE: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);

/// A browser without Hack takes its own monospaced font, all of which are about as wide.
const FAMILY: &str = "Hack, monospace";

/// Makes the font known to plotters, once.
pub fn register_font() -> Result<(), Error> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let font = epaint_default_fonts::HACK_REGULAR;
    let registered =
        *REGISTERED.get_or_init(|| plotters::style::register_font(FAMILY, FontStyle::Normal, font).is_ok());
    if registered { Ok(()) } else { Err(super::drawing("the font cannot be read")) }
}

/// Hack's characters are 0.602 of an em wide and its lines 1.164 em high.
const WIDTH_TO_HEIGHT: f64 = 0.602 / 1.164;

/// Pixels that a text takes.
#[expect(clippy::cast_possible_truncation, reason = "labels are short")]
pub fn width(text: &str, height: i32) -> i32 {
    (text.chars().count() as f64 * f64::from(height) * WIDTH_TO_HEIGHT).ceil() as i32
}

/// Characters that so many pixels have room for.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a picture has thousands of pixels")]
pub fn characters(pixels: u32, height: i32) -> usize {
    (f64::from(pixels) / (f64::from(height) * WIDTH_TO_HEIGHT)) as usize
}

/// At most so many characters, cut at the end.
pub fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// At most so many characters, cut in the middle: names of layers begin and end with what tells them apart.
pub fn shortened(name: &str, most: usize) -> String {
    let characters: Vec<char> = name.chars().collect();
    if characters.len() <= most {
        return name.to_owned();
    }
    let end = most / 2;
    let start = most.saturating_sub(end + 1);
    characters[..start].iter().chain(&['…']).chain(&characters[characters.len() - end..]).collect()
}

pub fn style(height: i32, colour: &RGBColor) -> TextStyle<'static> {
    (FAMILY, height).into_font().color(colour)
}

/// Text that begins at a place, which is the middle of its height.
pub fn left<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    text: &str,
    at: (i32, i32),
    height: i32,
    colour: &RGBColor,
) -> Drawn<DB> {
    draw(area, text, at, style(height, colour).pos(Pos::new(HPos::Left, VPos::Center)))
}

/// Text around a place.
pub fn centred<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    text: &str,
    at: (i32, i32),
    height: i32,
    colour: &RGBColor,
) -> Drawn<DB> {
    draw(area, text, at, style(height, colour).pos(Pos::new(HPos::Center, VPos::Center)))
}

/// Text that ends at a place.
pub fn right<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    text: &str,
    at: (i32, i32),
    height: i32,
    colour: &RGBColor,
) -> Drawn<DB> {
    draw(area, text, at, style(height, colour).pos(Pos::new(HPos::Right, VPos::Center)))
}

/// Text that is read upwards and ends at a place.
pub fn upright<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    text: &str,
    at: (i32, i32),
    height: i32,
    colour: &RGBColor,
) -> Drawn<DB> {
    let font = (FAMILY, height).into_font().transform(FontTransform::Rotate270);
    draw(area, text, at, TextStyle::from(font).color(colour).pos(Pos::new(HPos::Right, VPos::Center)))
}

fn draw<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    text: &str,
    at: (i32, i32),
    style: TextStyle<'_>,
) -> Drawn<DB> {
    // XML has no place for these two, escaped or not. Control characters were replaced where the names came in.
    let text: String =
        text.chars().map(|c| if matches!(c, '\u{fffe}' | '\u{ffff}') { '\u{fffd}' } else { c }).collect();
    area.draw_text(&text, &style, at)
}
