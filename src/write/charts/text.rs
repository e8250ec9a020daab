//! Labels: one monospaced font, so that the width of a label is known before it is drawn; names made short.

/// Sizes, in pixels.
pub const TITLE: i32 = 18;
pub const HEADING: i32 = 14;
pub const SMALL: i32 = 12;
pub const TINY: i32 = 10;

/// A browser without Hack takes its own monospaced font; all are about as wide.
pub const FAMILY: &str = "Hack, monospace";
/// The width of Hack's characters, as a share of the font's size.
const WIDTH: f64 = 0.602;

/// Gives the width of a text, in pixels.
#[expect(clippy::cast_possible_truncation, reason = "labels are short")]
pub fn width(text: &str, size: i32) -> i32 {
    (text.chars().count() as f64 * f64::from(size) * WIDTH).ceil() as i32
}

/// Gives the number of characters that fit into so many pixels.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a picture has thousands of pixels")]
pub fn characters(pixels: i32, size: i32) -> usize {
    (f64::from(pixels.max(0)) / (f64::from(size) * WIDTH)) as usize
}

/// Cuts a text at the end, to at most so many characters.
pub fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// Cuts a name in the middle, to at most so many characters: the beginning and the end tell layers apart.
pub fn shortened(name: &str, most: usize) -> String {
    let characters: Vec<char> = name.chars().collect();
    if characters.len() <= most {
        return name.to_owned();
    }
    let end = most / 2;
    let start = most.saturating_sub(end + 1);
    characters[..start].iter().chain(&['…']).chain(&characters[characters.len() - end..]).collect()
}

/// Names for an axis.
pub struct Labels {
    /// One a name.
    pub short: Vec<String>,
    /// The part taken off them all, with a * in its middle; empty when nothing was.
    pub pattern: String,
}

impl Labels {
    /// Makes labels. Where a name is longer than `most`, all lose the beginning and the end that they share.
    pub fn of<'a>(names: impl Iterator<Item = &'a str> + Clone, most: usize) -> Self {
        let characters = |name: &'a str| name.chars().collect::<Vec<char>>();
        let long = names.clone().any(|name| name.chars().count() > most);
        let mut before = names.clone().next().map(characters).unwrap_or_default();
        let mut after = before.clone();
        for name in names.clone().map(characters) {
            let shared = before.iter().zip(&name).take_while(|(a, b)| a == b).count();
            before.truncate(shared);
            let shared = after.iter().rev().zip(name.iter().rev()).take_while(|(a, b)| a == b).count();
            after.drain(..after.len() - shared);
        }
        // Whole parts of names only: "layers.1" and "layers.12" share no number.
        let separates = |c: &char| !c.is_alphanumeric();
        before.truncate(before.iter().rposition(separates).map_or(0, |place| place + 1));
        after.drain(..after.iter().position(separates).unwrap_or(after.len()));
        let taken = before.len() + after.len();
        // The two may overlap when there is only one name.
        let fits = names.clone().all(|name| name.chars().count() > taken);
        if !long || !fits || taken == 0 {
            return Self { short: names.map(|name| shortened(name, most)).collect(), pattern: String::new() };
        }
        let middle = |name: &'a str| -> String {
            let name = characters(name);
            name[before.len()..name.len() - after.len()].iter().collect()
        };
        let pattern: String = before.iter().chain(&['*']).chain(&after).collect();
        Self { short: names.map(|name| shortened(&middle(name), most)).collect(), pattern }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_lose_what_they_share() {
        let names =
            ["model.layers.1.attention.weight", "model.layers.12.attention.weight", "model.layers.1.mlp.weight"];
        let labels = Labels::of(names.into_iter(), 20);
        assert_eq!(labels.short, ["1.attention", "12.attention", "1.mlp"]);
        assert_eq!(labels.pattern, "model.layers.*.weight");
        assert_eq!(Labels::of(names.into_iter(), 40).short, names);
        for names in [vec![], vec!["a.very.long.name.of.one"], vec!["aaaa.bbbb.cccc", "aaaa.bbbb.cccc.bbbb.cccc"]] {
            let labels = Labels::of(names.iter().copied(), 10);
            assert!(labels.short.len() == names.len() && labels.short.iter().all(|name| name.chars().count() <= 10));
        }
    }

    #[test]
    fn names_are_cut_to_size() {
        assert_eq!(shortened("abcdefghij", 5), "ab…ij");
        assert_eq!(shortened("∇∇∇∇", 4), "∇∇∇∇");
        assert_eq!(cut("abcdef", 4), "abc…");
    }
}
