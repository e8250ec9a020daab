//! PTX as text to statements, each with its line. What an instruction means is for [`crate::instruction`].
//!
//! Only what a compiler prints for a kernel is understood: no module variables, no debug sections. Functions are put in where
//! they are called, their parameters being registers; one that calls another is not understood. The crates
//! that parse all of PTX are either given up (ptx-parser, ptx-90-parser) or have no release yet (singe-ptx), and each has
//! a type an opcode, which would double the table that gives opcodes their meaning here.

use crate::{SourceError, calls::with_calls};
use std::collections::HashMap;

/// Of parameters and of memory that a block shares: what the largest multiprocessor has.
const LARGEST_VARIABLE: u64 = 228 << 10;
/// Of a kernel.
const MOST_REGISTERS: usize = 1 << 20;
const MOST_THREADS: u64 = 1024;

/// What stands between the braces of a `.entry`, and its head.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    pub name: String,
    pub parameters: Vec<Variable>,
    /// Of a function.
    pub results: Vec<Variable>,
    /// Of a block, if it says so.
    pub max_threads: Option<u32>,
    /// Each name with its type: `b32`, `pred`.
    pub registers: Vec<(String, String)>,
    pub shared: Vec<Variable>,
    pub statements: Vec<Statement>,
    /// The statement behind each label.
    pub labels: HashMap<String, usize>,
}

/// A parameter, or memory of a block.
#[derive(Clone, Debug)]
pub struct Variable {
    pub name: String,
    pub align: u64,
    pub bytes: u64,
}

/// One instruction.
#[derive(Clone, Debug)]
pub struct Statement {
    pub line: u32,
    /// The register of the guard, and whether it must be false.
    pub guard: Option<(String, bool)>,
    /// With its modifiers: `ld.global.nc.v4.u32`.
    pub opcode: String,
    pub operands: Vec<Operand>,
    /// The bytes of a vector that are used, where a pragma says that not all are.
    pub used_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register, a label, a variable or its address.
    Name(String),
    /// The bits of a literal: an integer's in two's complement.
    Literal(u64),
    /// In brackets: a name, or nothing, and what is added to it.
    Address(Option<String>, i64),
    /// In braces.
    Vector(Vec<Operand>),
    /// `a|b`: a result and a predicate.
    Pair(String, String),
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Sign(char),
}

struct Tokens {
    tokens: Vec<(u32, Token)>,
    next: usize,
}

/// All the entries of a module.
pub fn parse(text: &str) -> Result<Vec<Entry>, SourceError> {
    let mut tokens = Tokens { tokens: tokenize(text)?, next: 0 };
    let (mut entries, mut functions, mut shared) = (Vec::new(), HashMap::new(), Vec::new());
    let mut is_module = false;
    while let Some((line, token)) = tokens.take() {
        match token {
            Token::Word(word) => match word.as_str() {
                ".version" => {
                    is_module = true;
                    tokens.word()?;
                }
                ".target" => {
                    tokens.word()?;
                    while tokens.sign(',') {
                        tokens.word()?;
                    }
                }
                ".file" => tokens.file()?,
                ".address_size" => {
                    if tokens.word()? != "64" {
                        return Err(SourceError::new(line, "addresses are not of 64 bits"));
                    }
                }
                // Of functions that several kernels were given a copy of.
                ".shared" => {
                    shared.push(tokens.variable()?);
                    tokens.demand(';')?;
                }
                // NVRTC leaves every constant of the source as one. No kernel reads them: their names are not known in one.
                ".global" | ".const" => while !tokens.sign(';') && tokens.take().is_some() {},
                ".visible" | ".weak" => {}
                ".entry" => entries.push(entry(&mut tokens)?),
                ".func" => {
                    let results = if tokens.sign('(') { variables(&mut tokens)? } else { Vec::new() };
                    if let Some(function) = function(&mut tokens, results)? {
                        functions.insert(function.name.clone(), function);
                    }
                }
                other => return Err(SourceError::new(line, format!("a module with `{other}` is not understood"))),
            },
            other => return Err(SourceError::new(line, format!("{other:?} between the kernels"))),
        }
    }
    if !is_module {
        return Err(SourceError::new(1, "no `.version`: this is no PTX"));
    }
    let with_shared = |mut entry: Entry| {
        entry.shared.extend_from_slice(&shared);
        with_calls(entry, &functions)
    };
    entries.into_iter().map(with_shared).collect()
}

fn tokenize(text: &str) -> Result<Vec<(u32, Token)>, SourceError> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut rest = text;
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$' | '%');
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").ok_or_else(|| SourceError::new(line, "a comment without an end"))? + 2
        } else if first == '"' {
            let end = rest[1..].find('"').ok_or_else(|| SourceError::new(line, "a string without an end"))?;
            tokens.push((line, Token::Text(rest[1..=end].to_owned())));
            end + 2
        } else if is_word(first) {
            // `::` joins words, as in `L1::no_allocate`.
            let mut end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            while rest[end..].starts_with("::") {
                end += 2;
                end += rest[end..].find(|c| !is_word(c)).unwrap_or(rest.len() - end);
            }
            tokens.push((line, Token::Word(rest[..end].to_owned())));
            end
        } else if first.is_whitespace() {
            first.len_utf8()
        } else if first.is_ascii_punctuation() {
            tokens.push((line, Token::Sign(first)));
            1
        } else {
            return Err(SourceError::new(line, format!("{first:?} is no part of PTX")));
        };
        line += rest[..length].matches('\n').count() as u32;
        rest = &rest[length..];
    }
    Ok(tokens)
}

impl Tokens {
    fn line(&self) -> u32 {
        self.tokens.get(self.next).or(self.tokens.last()).map_or(1, |(line, _)| *line)
    }

    fn take(&mut self) -> Option<(u32, Token)> {
        let token = self.tokens.get(self.next).cloned();
        self.next += 1;
        token
    }

    /// `1 "name"`, and perhaps two numbers more, behind `.file`.
    fn file(&mut self) -> Result<(), SourceError> {
        self.number()?;
        let line = self.line();
        if !matches!(self.take(), Some((_, Token::Text(_)))) {
            return Err(SourceError::new(line, "`.file` without a name"));
        }
        while self.sign(',') {
            self.number()?;
        }
        Ok(())
    }

    /// A comma, or the sign that ends a list, which is then taken.
    fn ends(&mut self, close: char) -> Result<bool, SourceError> {
        if self.sign(close) {
            return Ok(true);
        }
        self.demand(',').map(|()| false)
    }

    /// Whether the next is this sign, which is then taken.
    fn sign(&mut self, sign: char) -> bool {
        let found = matches!(self.tokens.get(self.next), Some((_, Token::Sign(c))) if *c == sign);
        self.next += usize::from(found);
        found
    }

    fn demand(&mut self, sign: char) -> Result<(), SourceError> {
        let line = self.line();
        if self.sign(sign) { Ok(()) } else { Err(SourceError::new(line, format!("`{sign}` is missing"))) }
    }

    fn peek_word(&self) -> Option<&str> {
        match self.tokens.get(self.next) {
            Some((_, Token::Word(word))) => Some(word),
            _ => None,
        }
    }

    fn word(&mut self) -> Result<String, SourceError> {
        let line = self.line();
        match self.take() {
            Some((_, Token::Word(word))) => Ok(word),
            Some((line, other)) => Err(SourceError::new(line, format!("{other:?} where a word should be"))),
            None => Err(SourceError::new(line, "the text ends in the middle of something")),
        }
    }

    fn number(&mut self) -> Result<u64, SourceError> {
        let (line, word) = (self.line(), self.word()?);
        literal(&word).ok_or_else(|| SourceError::new(line, format!("`{word}` is no number")))
    }

    /// `.align 8 .b8 name[344]` or `.u64 name`, behind its state space.
    fn variable(&mut self) -> Result<Variable, SourceError> {
        let line = self.line();
        let mut align = None;
        let mut element = self.word()?;
        if element == ".align" {
            align = Some(self.number()?).filter(|align| align.is_power_of_two() && *align <= 4096);
            if align.is_none() {
                return Err(SourceError::new(line, "an alignment that is no power of two up to 4096"));
            }
            element = self.word()?;
        }
        let width = width(element.trim_start_matches('.'))
            .ok_or_else(|| SourceError::new(line, format!("a variable of `{element}` is not understood")))?;
        let name = self.word()?;
        let mut bytes = width;
        if self.sign('[') {
            bytes = width.saturating_mul(self.number()?);
            self.demand(']')?;
        }
        if bytes > LARGEST_VARIABLE {
            return Err(SourceError::new(
                line,
                format!("{name} has {bytes} bytes, more than the {LARGEST_VARIABLE} that there can be"),
            ));
        }
        Ok(Variable { name, align: align.unwrap_or(width), bytes })
    }
}

/// The bytes of a type such as `u32`; of a predicate and what is no type, none.
pub fn width(of: &str) -> Option<u64> {
    Some(match of {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" => 2,
        "b32" | "u32" | "s32" | "f32" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        _ => return None,
    })
}

/// The bits of `12`, `0x1f`, `12U`, `0f3F800000` or `0d3FF0000000000000`.
fn literal(word: &str) -> Option<u64> {
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    match word.get(..2) {
        Some("0f" | "0F") if word.len() == 10 => hex(&word[2..]),
        Some("0d" | "0D") if word.len() == 18 => hex(&word[2..]),
        Some("0x" | "0X") => hex(word[2..].trim_end_matches('U')),
        // Octal, with a 0 before it, is printed by no compiler.
        _ if word.len() > 1 && word.starts_with('0') => None,
        _ => word.trim_end_matches('U').parse().ok(),
    }
}

/// What stands between parentheses, of which the first has been read.
fn variables(tokens: &mut Tokens) -> Result<Vec<Variable>, SourceError> {
    let mut all = Vec::new();
    if tokens.sign(')') {
        return Ok(all);
    }
    loop {
        let line = tokens.line();
        if tokens.word()? != ".param" {
            return Err(SourceError::new(line, "a parameter without `.param`"));
        }
        all.push(tokens.variable()?);
        if tokens.ends(')')? {
            return Ok(all);
        }
    }
}

/// A function behind its results; nothing where it is only declared.
fn function(tokens: &mut Tokens, results: Vec<Variable>) -> Result<Option<Entry>, SourceError> {
    let mut entry = Entry { name: tokens.word()?, results, ..Entry::default() };
    if tokens.sign('(') {
        entry.parameters = variables(tokens)?;
    }
    if tokens.sign(';') {
        return Ok(None);
    }
    tokens.demand('{')?;
    let mut body = Body { scopes: vec![HashMap::new()], passed: Vec::new(), used_bytes: None, entry: Entry::default() };
    for variable in entry.results.iter().chain(&entry.parameters) {
        body.pass(variable.clone(), tokens.line())?;
    }
    body.entry = Entry { registers: body.entry.registers, ..entry };
    let line = tokens.line();
    let function = block(tokens, body)?;
    if !function.shared.is_empty() {
        return Err(SourceError::new(line, "a function with shared memory of its own is not understood"));
    }
    Ok(Some(function))
}

impl Operand {
    /// Changes every name in it.
    pub fn rename(&mut self, rename: &impl Fn(&mut String)) {
        match self {
            Self::Name(name) | Self::Address(Some(name), _) => rename(name),
            Self::Vector(all) => all.iter_mut().for_each(|operand| operand.rename(rename)),
            Self::Pair(a, b) => [a, b].into_iter().for_each(rename),
            Self::Literal(_) | Self::Address(None, _) => {}
        }
    }
}

fn entry(tokens: &mut Tokens) -> Result<Entry, SourceError> {
    let mut entry = Entry { name: tokens.word()?, ..Entry::default() };
    if tokens.sign('(') {
        entry.parameters = variables(tokens)?;
    }
    while !tokens.sign('{') {
        let line = tokens.line();
        match tokens.word()?.as_str() {
            ".maxntid" => {
                let mut threads = tokens.number()?;
                while tokens.sign(',') {
                    threads = threads.saturating_mul(tokens.number()?);
                }
                entry.max_threads = Some(threads.min(MOST_THREADS) as u32);
            }
            ".minnctapersm" | ".maxnreg" => drop(tokens.number()?),
            other => return Err(SourceError::new(line, format!("`{other}` of a kernel is not understood"))),
        }
    }
    block(tokens, Body { entry, scopes: vec![HashMap::new()], passed: Vec::new(), used_bytes: None })
}

/// Statements up to the brace that ends them. Calls and inline assembly open scopes with registers of their own.
fn block(tokens: &mut Tokens, mut body: Body) -> Result<Entry, SourceError> {
    while !body.scopes.is_empty() {
        let line = tokens.line();
        if tokens.sign('{') {
            body.scopes.push(HashMap::new());
        } else if tokens.sign('}') {
            body.scopes.pop();
        } else if !tokens.sign(';') {
            statement(tokens, &mut body, line)?;
        }
    }
    Ok(body.entry)
}

/// A kernel that is being read.
struct Body {
    entry: Entry,
    /// What registers are called in the scopes that are open, and what they are called here.
    scopes: Vec<HashMap<String, String>>,
    /// What is passed to functions and back: registers, though loaded from and stored to.
    passed: Vec<String>,
    /// For the load that comes next.
    used_bytes: Option<u64>,
}

impl Body {
    fn declare(&mut self, name: String, of: &str, line: u32) -> Result<(), SourceError> {
        let number = self.entry.registers.len();
        if number == MOST_REGISTERS {
            return Err(SourceError::new(line, format!("more than {MOST_REGISTERS} registers")));
        }
        let own = if self.scopes.len() > 1 { format!("{name} number {number}") } else { name.clone() };
        let scope = self.scopes.last_mut().expect("a body has a scope");
        if scope.insert(name.clone(), own.clone()).is_some() {
            return Err(SourceError::new(line, format!("the register {name} is declared twice")));
        }
        self.entry.registers.push((own, of.trim_start_matches('.').to_owned()));
        Ok(())
    }

    /// A name by that of its scope.
    fn resolve(&self, name: &mut String) {
        if let Some(own) = self.scopes.iter().rev().find_map(|scope| scope.get(name)) {
            name.clone_from(own);
        }
    }

    fn pass(&mut self, variable: Variable, line: u32) -> Result<(), SourceError> {
        self.declare(variable.name.clone(), &format!("b{}", 8 * variable.bytes), line)?;
        let mut name = variable.name;
        self.resolve(&mut name);
        self.passed.push(name);
        Ok(())
    }
}

/// A directive, a label or an instruction.
fn statement(tokens: &mut Tokens, body: &mut Body, line: u32) -> Result<(), SourceError> {
    let mut guard = None;
    if tokens.sign('@') {
        let negated = tokens.sign('!');
        let mut name = tokens.word()?;
        body.resolve(&mut name);
        guard = Some((name, negated));
    }
    let word = tokens.word()?;
    if guard.is_some() && word.starts_with('.') {
        return Err(SourceError::new(line, format!("`{word}` with a guard")));
    }
    match word.as_str() {
        ".reg" => {
            let of = tokens.word()?;
            loop {
                let name = tokens.word()?;
                if tokens.sign('<') {
                    let count = tokens.number()?;
                    tokens.demand('>')?;
                    for index in 0..count {
                        body.declare(format!("{name}{index}"), &of, line)?;
                    }
                } else {
                    body.declare(name, &of, line)?;
                }
                if !tokens.sign(',') {
                    break;
                }
            }
            return tokens.demand(';');
        }
        ".shared" => {
            body.entry.shared.push(tokens.variable()?);
            return tokens.demand(';');
        }
        ".param" => {
            let variable = tokens.variable()?;
            body.pass(variable, line)?;
            return tokens.demand(';');
        }
        ".pragma" => {
            match tokens.take() {
                Some((_, Token::Text(text))) if text == "nounroll" => {}
                Some((_, Token::Text(text))) if text.starts_with("used_bytes_mask ") => {
                    body.used_bytes = literal(&text["used_bytes_mask ".len()..]);
                }
                other => return Err(SourceError::new(line, format!("the pragma {other:?} is not understood"))),
            }
            return tokens.demand(';');
        }
        ".loc" => {
            for _ in 0..3 {
                tokens.number()?;
            }
            return Ok(());
        }
        directive if directive.starts_with('.') => {
            return Err(SourceError::new(line, format!("`{directive}` in a kernel is not understood")));
        }
        _ => {}
    }
    if guard.is_none() && tokens.sign(':') {
        let next = body.entry.statements.len();
        let twice = SourceError::new(line, format!("the label {word} is there twice"));
        return if body.entry.labels.insert(word, next).is_some() { Err(twice) } else { Ok(()) };
    }
    let mut operands = Vec::new();
    let mut ended = tokens.sign(';');
    while !ended {
        let mut operand = operand(tokens, true)?;
        operand.rename(&|name| body.resolve(name));
        operands.push(operand);
        ended = tokens.ends(';')?;
    }
    let mut word = word;
    if word.starts_with("ld.param") || word.starts_with("st.param") {
        for operand in &mut operands {
            if let Operand::Address(Some(name), 0) = operand
                && body.passed.contains(name)
            {
                *operand = Operand::Name(name.clone());
                word = word.replace("ld.param", "mov").replace("st.param", "mov");
            }
        }
    }
    let used_bytes = body.used_bytes.take();
    body.entry.statements.push(Statement { line, guard, opcode: word, operands, used_bytes });
    Ok(())
}

fn operand(tokens: &mut Tokens, may_be_vector: bool) -> Result<Operand, SourceError> {
    let line = tokens.line();
    for (open, close) in [('{', '}'), ('(', ')')] {
        if may_be_vector && tokens.sign(open) {
            let mut all = Vec::new();
            let mut ended = tokens.sign(close);
            while !ended {
                all.push(operand(tokens, false)?);
                ended = tokens.ends(close)?;
            }
            return Ok(Operand::Vector(all));
        }
    }
    if tokens.sign('[') {
        let base = tokens.peek_word().filter(|word| literal(word).is_none()).map(str::to_owned);
        let mut offset = 0i64;
        if base.is_some() {
            tokens.next += 1;
        } else {
            offset = tokens.number()?.cast_signed();
        }
        while !tokens.sign(']') {
            let has_plus = tokens.sign('+');
            let negative = tokens.sign('-');
            if !has_plus && !negative {
                return Err(SourceError::new(line, "an address is a name and what is added to it"));
            }
            let number = tokens.number()?.cast_signed();
            offset = offset.wrapping_add(if negative { number.wrapping_neg() } else { number });
        }
        return Ok(Operand::Address(base, offset));
    }
    if tokens.sign('-') {
        let is_float = tokens.peek_word().is_some_and(|word| word.starts_with("0f") || word.starts_with("0d"));
        if is_float {
            return Err(SourceError::new(line, "the bits of a float with a sign before them"));
        }
        return Ok(Operand::Literal(tokens.number()?.wrapping_neg()));
    }
    let word = tokens.word()?;
    if tokens.sign('|') {
        return Ok(Operand::Pair(word, tokens.word()?));
    }
    Ok(literal(&word).map_or(Operand::Name(word), Operand::Literal))
}
