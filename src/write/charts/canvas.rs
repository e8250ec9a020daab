//! The elements of pictures – areas, lines, discs and text – as an SVG document.

use super::{Colour, text};
use svg::{
    Document, Node,
    node::{
        Text,
        element::{Circle, Polyline, Rectangle, Text as TextElement},
    },
};

/// A document under construction. Places are pixels right of and below the origin of the present area.
pub struct Canvas {
    document: Document,
    origin: (i32, i32),
    /// Width of the present area.
    pub width: i32,
    /// Height of the present area.
    pub height: i32,
}

/// The part of a text that lies at its place. Its height is centred there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    Start,
    Middle,
    End,
    /// The end of a text that is read upwards.
    TopEnd,
}

fn hex([red, green, blue]: Colour) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

impl Canvas {
    pub fn new(width: i32, height: i32) -> Self {
        let document = Document::new().set("width", width).set("height", height).set("viewBox", (0, 0, width, height));
        let mut canvas = Self { document, origin: (0, 0), width, height };
        canvas.area((0, 0), (width, height), [0xff; 3]);
        canvas
    }

    /// Draws into a part of the present area.
    pub fn within(&mut self, (x, y): (i32, i32), (width, height): (i32, i32), draw: impl FnOnce(&mut Self)) {
        let outer = (self.origin, self.width, self.height);
        (self.origin, self.width, self.height) = ((outer.0.0 + x, outer.0.1 + y), width, height);
        draw(self);
        (self.origin, self.width, self.height) = outer;
    }

    fn at(&self, (x, y): (i32, i32)) -> (i32, i32) {
        (self.origin.0 + x, self.origin.1 + y)
    }

    /// A filled rectangle.
    pub fn area(&mut self, place: (i32, i32), (width, height): (i32, i32), colour: Colour) {
        let (x, y) = self.at(place);
        let area = Rectangle::new().set("x", x).set("y", y).set("width", width).set("height", height);
        self.document.append(area.set("fill", hex(colour)));
    }

    /// A line through these places.
    pub fn line(&mut self, places: &[(i32, i32)], colour: Colour, thickness: u32) {
        let points: Vec<String> = places.iter().map(|&place| self.at(place)).map(|(x, y)| format!("{x},{y}")).collect();
        let line = Polyline::new().set("points", points.join(" ")).set("fill", "none").set("stroke", hex(colour));
        self.document.append(line.set("stroke-width", thickness));
    }

    /// A filled circle.
    pub fn disc(&mut self, place: (i32, i32), radius: i32, colour: Colour) {
        let (x, y) = self.at(place);
        self.document.append(Circle::new().set("cx", x).set("cy", y).set("r", radius).set("fill", hex(colour)));
    }

    /// The outline of a circle.
    pub fn ring(&mut self, place: (i32, i32), radius: i32, colour: Colour) {
        let (x, y) = self.at(place);
        let ring = Circle::new().set("cx", x).set("cy", y).set("r", radius).set("fill", "none");
        self.document.append(ring.set("stroke", hex(colour)));
    }

    /// A line of text, `size` pixels high.
    pub fn text(&mut self, text: &str, place: (i32, i32), size: i32, colour: Colour, anchor: Anchor) {
        let (x, y) = self.at(place);
        let place = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End | Anchor::TopEnd => "end",
        };
        // XML has no place for these two, escaped or not. Control characters were replaced when names came in.
        let text = text.replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}");
        // From the middle of a digit down to its baseline.
        let descent = f64::from(size) * 0.36;
        let element = TextElement::new("")
            .set("x", x)
            .set("y", f64::from(y) + descent)
            .set("font-family", text::FAMILY)
            .set("font-size", size)
            .set("fill", hex(colour))
            .set("text-anchor", place);
        let mut element = match anchor {
            Anchor::TopEnd => element.set("transform", format!("rotate(-90 {x} {y})")),
            _ => element,
        };
        element.append(Text::new(text));
        self.document.append(element);
    }

    pub fn into_svg(self) -> String {
        self.document.to_string()
    }
}
