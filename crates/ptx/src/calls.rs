//! Functions in the places where they are called: parameters and results are registers, names those of the call.

use crate::{
    SourceError,
    parse::{Entry, Operand, Statement},
};
use std::collections::HashMap;

/// A kernel with the functions that it calls in their places.
pub fn with_calls(entry: Entry, functions: &HashMap<String, Entry>) -> Result<Entry, SourceError> {
    let mut labels_at: Vec<(usize, String)> = entry.labels.iter().map(|(label, &at)| (at, label.clone())).collect();
    labels_at.sort_unstable();
    let mut labels_at = labels_at.into_iter().peekable();
    let mut all = Entry { statements: Vec::new(), labels: HashMap::new(), ..entry.clone() };
    for (index, statement) in entry.statements.into_iter().enumerate() {
        while let Some((_, label)) = labels_at.next_if(|(at, _)| *at == index) {
            all.labels.insert(label, all.statements.len());
        }
        if statement.opcode.starts_with("call") {
            all.call(&statement, functions)?
        } else {
            all.statements.push(statement)
        }
    }
    all.labels.extend(labels_at.map(|(_, label)| (label, all.statements.len())));
    Ok(all)
}

impl Entry {
    /// Puts in what a call does: parameters, the function's statements under names of their own, results.
    fn call(&mut self, call: &Statement, functions: &HashMap<String, Entry>) -> Result<(), SourceError> {
        let wrong = |what: &str| SourceError::new(call.line, format!("`{}` {what}", call.opcode));
        if call.guard.is_some() {
            return Err(wrong("with a guard is not understood"));
        }
        let (results, name, parameters) = match &call.operands[..] {
            [Operand::Vector(results), Operand::Name(name), Operand::Vector(parameters)] => {
                (&results[..], name, &parameters[..])
            }
            [Operand::Name(name), Operand::Vector(parameters)] => (&[][..], name, &parameters[..]),
            _ => return Err(wrong("is not understood")),
        };
        let function = functions.get(name).ok_or_else(|| wrong("calls a function that is not there"))?;
        if (results.len(), parameters.len()) != (function.results.len(), function.parameters.len()) {
            return Err(wrong("has another number of operands than the function"));
        }
        let number = self.statements.len();
        let own = |name: &str| format!("{name} of {} at {number}", function.name);
        let move_to = |to: Operand, from: &Operand, bytes: u64| Statement {
            opcode: format!("mov.b{}", 8 * bytes),
            operands: vec![to, from.clone()],
            guard: None,
            used_bytes: None,
            ..call.clone()
        };
        self.registers.extend(function.registers.iter().map(|(name, of)| (own(name), of.clone())));
        for (variable, given) in function.parameters.iter().zip(parameters) {
            self.statements.push(move_to(Operand::Name(own(&variable.name)), given, variable.bytes));
        }
        let start = self.statements.len();
        self.labels.extend(function.labels.iter().map(|(label, &at)| (own(label), start + at)));
        let is_own = |name: &String| {
            function.registers.iter().any(|(known, _)| known == name) || function.labels.contains_key(name)
        };
        for statement in &function.statements {
            let mut statement = statement.clone();
            if statement.opcode.starts_with("call") {
                return Err(SourceError::new(statement.line, "a function that calls another is not understood"));
            }
            // With a space in it, which no name of PTX has.
            let end = Operand::Name("the end".to_owned());
            if matches!(statement.opcode.as_str(), "ret" | "ret.uni") {
                (statement.opcode, statement.operands) = ("bra".to_owned(), vec![end.clone()]);
            }
            let is_end = statement.operands == [end];
            let rename = |name: &mut String| {
                if is_end || is_own(name) {
                    *name = own(name)
                }
            };
            statement.operands.iter_mut().for_each(|operand| operand.rename(&rename));
            if let Some((guard, _)) = &mut statement.guard {
                *guard = own(guard);
            }
            self.statements.push(statement);
        }
        self.labels.insert(own("the end"), self.statements.len());
        for (variable, to) in function.results.iter().zip(results) {
            self.statements.push(move_to(to.clone(), &Operand::Name(own(&variable.name)), variable.bytes));
        }
        Ok(())
    }
}
