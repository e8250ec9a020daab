//! The place of tensors in the model, by their names.

use crate::Plan;

/// The part of a model that a tensor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorType {
    /// Of an attention: `attn`, `attention`, and projections of queries, keys and values.
    Attention,
    /// Of a feed-forward part: `mlp`, `ffn`, `feed_forward`, `fc`, `experts`.
    Mlp,
    /// An embedding: `embed`, `emb`, `wte`, `wpe`, and `pos`.
    Embedding,
    /// A normalisation: `norm`, `ln`, `bn`.
    Norm,
    /// The output: `head`, `classifier`, `score`, and `output` outside the numbered layers.
    Head,
    /// None of these.
    Other,
}

impl TensorType {
    /// Every one.
    pub const ALL: [TensorType; 6] = [Self::Attention, Self::Mlp, Self::Embedding, Self::Norm, Self::Head, Self::Other];

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Mlp => "mlp",
            Self::Embedding => "embedding",
            Self::Norm => "norm",
            Self::Head => "head",
            Self::Other => "other",
        }
    }

    /// Finds the part from the name of a tensor, as model libraries name them.
    pub fn of(name: &str) -> Self {
        let name = name.to_lowercase();
        let has = |words: &[&str]| components(&name).any(|part| words.iter().any(|word| part.contains(word)));
        // Without the number behind it: `ln1`, `fc2`.
        let is = |words: &[&str]| {
            components(&name)
                .any(|part| words.contains(&part.trim_end_matches(|c: char| c.is_ascii_digit() || c == '_')))
        };
        // In a numbered layer, `output` is the end of a feed-forward part.
        let in_layer = layer_of(&name).is_some();
        if has(&["norm"]) || is(&["ln", "ln_f", "bn", "rms"]) {
            Self::Norm
        } else if !in_layer && is(&["head", "lm_head", "unembed", "output", "score", "logits", "classifier"]) {
            Self::Head
        } else if has(&["embed"]) || is(&["emb", "wte", "wpe", "pos"]) {
            Self::Embedding
        } else if has(&["attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", "qkv"]) {
            Self::Attention
        } else if has(&["mlp", "ffn", "feed_forward", "feedforward", "expert", "gate_proj", "up_proj", "down_proj"])
            || is(&["fc", "ff", "intermediate"])
            || (in_layer && is(&["output"]))
        {
            Self::Mlp
        } else if has(&["head", "classifier"]) {
            Self::Head
        } else {
            Self::Other
        }
    }
}

fn components(name: &str) -> impl Iterator<Item = &str> {
    name.split(['.', '/', ':'])
}

/// Gives the name with each number in it replaced by one mark: the same for all tensors of a stack.
pub(super) fn without_numbers(name: &str) -> String {
    let mut result = String::new();
    for c in name.chars() {
        match (c.is_ascii_digit(), result.ends_with('#')) {
            (true, true) => {}
            (true, false) => result.push('#'),
            (false, _) => result.push(c),
        }
    }
    result
}

/// Finds the layer in a name: the part before the number, and the number. That is the first part that is all digits
/// (`blocks.3.`, `h.0.`), else the first that ends in digits (`fc1.weight`); the last part names the tensor alone.
pub(super) fn layer_of(name: &str) -> Option<(&str, u64)> {
    let mut ending = None;
    let mut start = 0;
    for part in components(name) {
        let end = start + part.len();
        let digits = part.len() - part.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        if end < name.len() && digits > 0 {
            let number = name[end - digits..end].parse().ok().map(|number| (&name[..end - digits], number));
            if digits == part.len() {
                return number;
            }
            ending = ending.or(number);
        }
        start = end + 1;
    }
    ending
}

/// Gives the layer of each tensor, as its place in the depth, and the layers' names from the input on. Layers of one
/// stack are ordered by their numbers, stacks by their first place in the plan. Where the names number fewer than two
/// layers, every tensor is a layer.
pub(super) fn layers(plan: &Plan) -> (Vec<Option<usize>>, Vec<String>) {
    let found: Vec<Option<(&str, u64)>> = plan.tensors().iter().map(|tensor| layer_of(&tensor.name)).collect();
    let mut stacks: Vec<&str> = Vec::new();
    let mut keys: Vec<(usize, u64)> = Vec::new();
    let key_of: Vec<Option<(usize, u64)>> = found
        .iter()
        .map(|layer| {
            layer.map(|(stack, number)| {
                let place = stacks.iter().position(|&other| other == stack).unwrap_or_else(|| {
                    stacks.push(stack);
                    stacks.len() - 1
                });
                (place, number)
            })
        })
        .collect();
    keys.extend(key_of.iter().flatten());
    keys.sort_unstable();
    keys.dedup();
    if keys.len() < 2 {
        let names = plan.tensors().iter().map(|tensor| tensor.name.clone()).collect();
        return ((0..plan.tensors().len()).map(Some).collect(), names);
    }
    let places = key_of.iter().map(|key| key.and_then(|key| keys.binary_search(&key).ok())).collect();
    (places, keys.iter().map(|&(stack, number)| format!("{}{number}", stacks[stack])).collect())
}

/// Gives the order in which a backward pass reaches the tensors, as far as their names tell: the head, a last
/// normalisation, the layers from the last to the first, then the embeddings. Within a block of a transformer: the
/// feed-forward part from its end, the norm before it, the attention from its output, the norm before that. Where names
/// say nothing, the reverse of the plan's order. For plans that are not in the order of the forward pass, such as those
/// sorted by name.
pub fn backward_order(plan: &Plan) -> Vec<usize> {
    let (places, layers) = layers(plan);
    let numbered = plan.tensors().iter().any(|tensor| layer_of(&tensor.name).is_some());
    let key = |index: usize| {
        let name = plan.tensors()[index].name.to_lowercase();
        let of = TensorType::of(&name);
        let stage = match of {
            TensorType::Embedding => 3,
            TensorType::Head => 0,
            _ if numbered && places[index].is_none() => 1,
            _ => 2,
        };
        let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
        let within = match of {
            TensorType::Mlp if has(&["down", "c_proj", "fc2", "fc_out", "w2", "output"]) => 0,
            TensorType::Mlp => 1,
            TensorType::Norm if has(&["2", "post_attention", "ffn", "final"]) => 2,
            TensorType::Attention
                if !has(&["qkv", "c_attn", "q_proj", "k_proj", "v_proj", "query", "key", "value"]) =>
            {
                3
            }
            TensorType::Attention => 4,
            TensorType::Norm => 5,
            _ => 1,
        };
        // Only names of layers order them; otherwise the plan does.
        let depth = places[index].filter(|_| numbered).map_or(0, |place| layers.len() - place);
        (stage, depth, if numbered { within } else { 0 }, std::cmp::Reverse(index))
    };
    let mut order: Vec<usize> = (0..plan.tensors().len()).collect();
    order.sort_by_key(|&index| key(index));
    order
}
