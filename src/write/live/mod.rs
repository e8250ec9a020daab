//! Shows a run in the terminal: the total norm over the steps, the tensors, the worst first, and the findings with
//! their usual remedies.
//!
//! [`View`] is for programs with a terminal interface of their own on ratatui. [`Live`] takes the terminal over.
//! [`follow`] does so for a program with no other work, such as one that reads the steps of another.

mod terminal;

pub use ratatui;
pub use terminal::{Live, follow};

use super::Entry;
use crate::{Error, Finding, Plan, Verdict, measure::printable};
use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Style, Stylize},
    symbols::Marker,
    text::{Line, Span},
    widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph, Row, Table},
};
use std::collections::VecDeque;

/// Steps of the curve: more than a terminal has columns.
const STEPS: usize = 400;

/// Draws a run. Holds the last 400 norms, and of each tensor the last step.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The plan of the entries; `None` where steps are given.
    plan: Option<Plan>,
    /// The last step, with the tensors of the last step that had any.
    now: ViewStep,
    norms: VecDeque<(u64, f64)>,
    /// The step of the tensors, and their norms in the step before that.
    detailed: u64,
    previous: Vec<f64>,
    /// The first tensor shown.
    scroll: usize,
}

/// A step in a [`View`].
#[derive(Clone, Debug, Default)]
pub struct ViewStep {
    /// Its number.
    pub step: u64,
    /// Its verdict, if the step was diagnosed.
    pub verdict: Option<Verdict>,
    /// The norm of all gradients.
    pub total_norm: f64,
    /// The coefficient of the clip, if anything is clipped.
    pub clip_coefficient: Option<f64>,
    /// Whether it is to be skipped.
    pub skip: bool,
    /// The tensors in the plan's order. Empty where only the step's own numbers are known: the view keeps those of an
    /// earlier step.
    pub tensors: Vec<ViewTensor>,
    /// Its findings.
    pub findings: Vec<ViewFinding>,
}

/// A tensor of a step in a [`View`].
#[derive(Clone, Debug)]
pub struct ViewTensor {
    /// Its name.
    pub name: String,
    /// Its verdict, if the step was diagnosed.
    pub verdict: Option<Verdict>,
    /// The norm of its gradient.
    pub norm: f64,
    /// The share of its elements below the dead threshold.
    pub dead_fraction: Option<f64>,
    /// As [`TensorReport::remarks`](crate::TensorReport::remarks) has them.
    pub remarks: String,
}

/// A finding in a [`View`].
#[derive(Clone, Debug)]
pub struct ViewFinding {
    /// Its severity.
    pub severity: Verdict,
    /// The name of its kind.
    pub kind: String,
    /// The tensor it concerns; `None` where it is about all of them.
    pub tensor: Option<String>,
    /// How many others it concerns.
    pub others: usize,
    /// The finding in a sentence.
    pub message: String,
    /// Advice, most promising first.
    pub advice: Vec<String>,
}

impl From<&Entry> for ViewStep {
    fn from(entry: &Entry) -> Self {
        let outputs = entry.report().outputs();
        let tensors = entry.tensors().map(|tensor| ViewTensor {
            name: tensor.report.name.to_owned(),
            verdict: tensor.verdict,
            norm: tensor.report.record.l2_norm(),
            dead_fraction: tensor.report.record.dead_fraction(),
            remarks: tensor.report.remarks(),
        });
        Self {
            step: entry.step(),
            verdict: entry.verdict(),
            total_norm: outputs.total_norm,
            clip_coefficient: Some(outputs.coefficient_f64),
            skip: outputs.skip != 0,
            tensors: tensors.collect(),
            findings: entry.findings().iter().map(ViewFinding::from).collect(),
        }
    }
}

impl From<&Finding> for ViewFinding {
    fn from(finding: &Finding) -> Self {
        Self {
            severity: finding.severity,
            kind: finding.kind.to_string(),
            tensor: finding.tensor.clone(),
            others: finding.others.len(),
            message: finding.message.clone(),
            advice: finding.advice.iter().copied().map(str::to_owned).collect(),
        }
    }
}

impl View {
    /// Makes the view of a run with these tensors, before its first step. [`View::default`] takes the tensors from the
    /// steps.
    pub fn new(plan: &Plan) -> Self {
        Self { plan: Some(plan.clone()), ..Self::default() }
    }

    /// Shows a step. One that is not after the last begins the curve anew: the run was restarted.
    ///
    /// # Errors
    /// [`Error::EntryOfAnotherPlan`].
    pub fn update(&mut self, entry: &Entry) -> Result<(), Error> {
        if let Some(plan) = &self.plan {
            entry.report().plan().check_entry(plan, "view")?;
        }
        self.show(entry.into());
        Ok(())
    }

    /// Shows a step that was measured elsewhere.
    pub fn show(&mut self, mut step: ViewStep) {
        if step.step <= self.now.step {
            self.norms.clear();
        }
        if self.norms.len() == STEPS {
            self.norms.pop_front();
        }
        self.norms.push_back((step.step, step.total_norm));
        if step.tensors.is_empty() {
            step.tensors = std::mem::take(&mut self.now.tensors);
        } else {
            self.previous = self.now.tensors.iter().map(|tensor| tensor.norm).collect();
            self.detailed = step.step;
        }
        // The worst first, the rest in their order.
        step.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        self.now = step;
    }

    /// Moves the list of tensors by so many, up or down.
    pub fn scroll(&mut self, by: isize) {
        self.scroll = self.scroll.saturating_add_signed(by).min(self.now.tensors.len().saturating_sub(1));
    }

    /// Draws the view over the whole frame, of any size.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let findings = self.findings_lines();
        let wanted = u16::try_from(findings.len()).unwrap_or(u16::MAX).saturating_add(2);
        let third = area.height / 3;
        let [header, curve, tensors, below] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(third.min(12)),
            Constraint::Min(0),
            Constraint::Length(if self.now.findings.is_empty() { 0 } else { wanted.min(third) }),
        ])
        .areas(area);
        frame.render_widget(self.header(), header);
        self.draw_curve(frame, curve);
        self.draw_tensors(frame, tensors);
        frame.render_widget(Paragraph::new(findings).block(Block::bordered().title(" findings ")), below);
    }

    fn header(&self) -> Line<'static> {
        let total = self.norms.back().map_or_else(|| "–".to_owned(), |(_, norm)| format!("{norm:.4e}"));
        let mut spans =
            vec![Span::from(format!(" step {}  ", self.now.step)).bold(), Span::from(format!("total norm {total}  "))];
        if let Some(verdict) = self.now.verdict {
            spans.push(Span::styled(format!("{verdict}  "), style(Some(verdict)).bold()));
        }
        if let Some(coefficient) = self.now.clip_coefficient.filter(|&coefficient| coefficient != 1.0) {
            spans.push(Span::from(format!("clipped by {coefficient:.3e}  ")));
        }
        if self.now.skip {
            spans.push("to be skipped  ".fg(Color::Red));
        }
        let bad = self.norms.iter().filter(|(_, norm)| !norm.is_finite()).count();
        if bad > 0 {
            spans.push(format!("not finite in {bad} of the last {} steps", self.norms.len()).fg(Color::Magenta));
        }
        Line::from(spans)
    }

    /// The total norm by its decadic logarithm; along the upper edge the steps with a norm that is not finite.
    fn draw_curve(&self, frame: &mut Frame<'_>, area: Rect) {
        let of_step = |step: u64| step as f64;
        let shown: Vec<(f64, f64)> = self
            .norms
            .iter()
            .filter(|(_, norm)| norm.is_finite() && *norm > 0.0)
            .map(|&(step, norm)| (of_step(step), norm.log10()))
            .collect();
        let low = shown.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
        let high = shown.iter().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = if shown.is_empty() { (-1.0, 0.0) } else { (low.floor(), (high + 0.01).ceil()) };
        let bad: Vec<(f64, f64)> =
            self.norms.iter().filter(|(_, norm)| !norm.is_finite()).map(|&(step, _)| (of_step(step), high)).collect();
        let first = self.norms.front().map_or(0, |&(step, _)| step);
        let last = self.norms.back().map_or(1, |&(step, _)| step).max(first + 1);
        let curve = Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).data(&shown).cyan();
        let marks = Dataset::default().marker(Marker::Block).graph_type(GraphType::Scatter).data(&bad).magenta();
        let labels = |ends: [String; 2]| ends.map(Line::from);
        let x_axis = Axis::default()
            .bounds([of_step(first), of_step(last)])
            .labels(labels([first.to_string(), last.to_string()]))
            .labels_alignment(Alignment::Right);
        let y_axis =
            Axis::default().bounds([low, high]).labels(labels([low, high].map(|decade| format!("1e{decade}"))));
        let chart = Chart::new(vec![curve, marks]).x_axis(x_axis).y_axis(y_axis);
        frame.render_widget(chart.block(Block::bordered().title(" total norm over steps ")), area);
    }

    fn draw_tensors(&self, frame: &mut Frame<'_>, area: Rect) {
        let mut order: Vec<(usize, &ViewTensor)> = self.now.tensors.iter().enumerate().collect();
        order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.verdict));
        let rows = order.iter().skip(self.scroll).take(area.height.into()).map(|&(place, tensor)| {
            let verdict = tensor.verdict.map_or_else(|| "–".to_owned(), |verdict| verdict.to_string());
            let change = self.change(place).map_or_else(|| "–".to_owned(), |change| format!("×{change:.3}"));
            let dead = tensor.dead_fraction.map_or_else(|| "–".to_owned(), |dead| format!("{:.2}", 100.0 * dead));
            let cells = [
                Line::from(verdict).style(style(tensor.verdict)),
                Line::from(printable(&tensor.name)),
                Line::from(format!("{:.3e}", tensor.norm)).right_aligned(),
                Line::from(change).right_aligned(),
                Line::from(dead).right_aligned(),
                Line::from(tensor.remarks.as_str()),
            ];
            Row::new(cells)
        });
        let right = |title: &'static str| Line::from(title).right_aligned();
        let titles =
            [Line::from("verdict"), "tensor".into(), right("l2 norm"), right("change"), right("dead %"), "".into()];
        let widths = [
            Constraint::Length(8),
            Constraint::Fill(2),
            Constraint::Length(10),
            Constraint::Length(10),
            Constraint::Length(7),
            Constraint::Fill(1),
        ];
        let count = self.now.tensors.len();
        let of = if self.detailed < self.now.step { format!("of step {} ", self.detailed) } else { String::new() };
        let title = format!(" tensors {} to {count} {of}", count.min(self.scroll + 1));
        let table = Table::new(rows, widths).header(Row::new(titles).bold()).block(Block::bordered().title(title));
        frame.render_widget(table, area);
    }

    /// The norm of a tensor over that of the step before, if both are usable.
    fn change(&self, place: usize) -> Option<f64> {
        let previous = self.previous.get(place).copied().filter(|&previous| previous > 0.0);
        previous.map(|previous| self.now.tensors[place].norm / previous).filter(|change| change.is_finite())
    }

    fn findings_lines(&self) -> Vec<Line<'_>> {
        let mut lines = Vec::new();
        let mut told: Vec<&str> = Vec::new();
        for finding in &self.now.findings {
            let style = style(Some(finding.severity));
            let tensor = finding.tensor.as_deref().map_or_else(String::new, |name| format!(" {}", printable(name)));
            let others = finding.others;
            let tensor = if others > 0 { format!("{tensor} and {others} more") } else { tensor };
            lines.push(Line::from(vec![
                Span::styled(format!("{} {}", finding.severity, finding.kind), style),
                Span::from(format!("{tensor}: {}", printable(&finding.message))),
            ]));
            // Advice that was given above is not repeated.
            let new =
                finding.advice.iter().map(String::as_str).filter(|advice| !told.contains(advice)).collect::<Vec<_>>();
            if !new.is_empty() {
                lines.push(Line::from(format!("  → {}", new.join("; "))));
                told.extend(new);
            }
        }
        lines
    }
}

fn style(verdict: Option<Verdict>) -> Style {
    match verdict {
        None => Style::new(),
        Some(Verdict::Healthy) => Style::new().fg(Color::Green),
        Some(Verdict::Warning) => Style::new().fg(Color::Yellow),
        Some(Verdict::Critical) => Style::new().fg(Color::Red),
    }
}
