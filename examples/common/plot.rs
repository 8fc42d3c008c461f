//! Line charts as SVG files.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

pub const BLUE_LINE: RGBColor = RGBColor(31, 119, 180);
pub const ORANGE_LINE: RGBColor = RGBColor(230, 97, 1);

/// A chart of named lines over `0, 1, ..`, with a label on the x axis at each of `ticks`.
pub struct Chart<'a> {
    pub file: &'a Path,
    pub title: String,
    pub x_title: &'a str,
    pub y_title: &'a str,
    /// A logarithmic y axis: values that are not above zero, or not finite, are left out.
    pub log: bool,
    pub ticks: Vec<(usize, String)>,
    pub lines: Vec<(&'a str, RGBColor, Vec<f32>)>,
}

impl Chart<'_> {
    /// Writes the file.
    pub fn draw(mut self) -> Result<()> {
        if self.log {
            // As if it were no number.
            self.lines
                .iter_mut()
                .flat_map(|(.., values)| values)
                .filter(|value| **value <= 0.0)
                .for_each(|value| *value = f32::NAN);
        }
        let values = || self.lines.iter().flat_map(|(.., values)| values.iter().copied()).filter(|value| value.is_finite());
        let (low, high) = (values().fold(f32::MAX, f32::min), values().fold(f32::MIN, f32::max));
        if self.log {
            // Whole powers of ten that f32 has; from 1 to 10 where nothing is to be drawn.
            let (low, high) =
                if low <= high { (low.log10().floor().min(37.0), high.log10().ceil().min(38.0)) } else { (0.0, 1.0) };
            let y_axis = (10f32.powf(low)..10f32.powf(high.max(low + 1.0))).log_scale();
            return self.draw_on(y_axis, |value| format!("{value:.0e}"));
        }
        let margin = 0.05 * (high - low).max(0.1);
        let digits = if high - low < 5.0 { 2 } else { 0 };
        self.draw_on(low - margin..high + margin, |value| format!("{value:.digits$}"))
    }

    fn draw_on<Y: AsRangedCoord<Value = f32>>(self, y_axis: Y, number: impl Fn(&f32) -> String) -> Result<()>
    where
        Y::CoordDescType: ValueFormatter<f32>,
    {
        let Self { file, title, x_title, y_title, log, ticks, lines } = self;
        let last = lines.iter().map(|(.., values)| values.len()).max().unwrap_or(0).saturating_sub(1).max(1);
        let label = |at: &usize| ticks.iter().find(|(tick, _)| tick == at).map_or(String::new(), |(_, label)| label.clone());

        let root = SVGBackend::new(file, (1000, 440)).into_drawing_area();
        root.fill(&WHITE)?;
        let x_axis = (0..last).with_key_points(ticks.iter().map(|(tick, _)| *tick).collect());
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(46)
            .y_label_area_size(60)
            .build_cartesian_2d(x_axis, y_axis)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(x_title).y_desc(y_title).x_label_formatter(&label).y_label_formatter(&number);
        mesh.light_line_style(TRANSPARENT).label_style(("sans-serif", 14)).draw()?;
        for (name, color, values) in lines {
            let series =
                LineSeries::new(values.into_iter().enumerate().filter(|(_, value)| value.is_finite()), color.stroke_width(2));
            let sample = move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], color.stroke_width(2));
            chart.draw_series(series)?.label(name).legend(sample);
        }
        let mut legend = chart.configure_series_labels();
        legend
            .position(if log { SeriesLabelPosition::LowerRight } else { SeriesLabelPosition::UpperRight })
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.4));
        legend.label_font(("sans-serif", 14)).draw()?;
        root.present().with_context(|| format!("writing {}", file.display()))
    }
}
