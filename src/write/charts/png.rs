//! The pixels of an SVG document.

use crate::Error;
use resvg::{tiny_skia::Pixmap, usvg};
use std::{
    fmt::Display,
    sync::{Arc, OnceLock},
};

/// The document as a PNG file.
///
/// # Errors
/// [`Error::Drawing`].
pub fn encode(svg: &str) -> Result<Vec<u8>, Error> {
    static FONTS: OnceLock<Arc<usvg::fontdb::Database>> = OnceLock::new();
    let fonts = FONTS.get_or_init(|| {
        let mut fonts = usvg::fontdb::Database::new();
        fonts.load_font_data(epaint_default_fonts::HACK_REGULAR.to_vec());
        Arc::new(fonts)
    });
    let options = usvg::Options { fontdb: Arc::clone(fonts), ..usvg::Options::default() };
    let tree = usvg::Tree::from_str(svg, &options).map_err(drawing)?;
    let size = tree.size().to_int_size();
    let mut pixels = Pixmap::new(size.width(), size.height()).ok_or_else(|| drawing("no memory for the pixels"))?;
    resvg::render(&tree, usvg::Transform::identity(), &mut pixels.as_mut());
    pixels.encode_png().map_err(drawing)
}

fn drawing(error: impl Display) -> Error {
    Error::Drawing { reason: error.to_string() }
}
