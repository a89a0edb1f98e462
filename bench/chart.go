package main

import (
	"fmt"
	"image/color"
	"os"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The colours of the library and of everybody else; they differ in lightness, too.
var (
	oursColor  = color.RGBA{R: 0xc4, G: 0x4e, B: 0x1c, A: 0xff}
	otherColor = color.RGBA{R: 0x9a, G: 0xa5, B: 0xb1, A: 0xff}
)

// draw writes a chart of what a full run has found.
func (r *report) draw(file string) {
	const mib, gib = 1 << 20, 1 << 30
	plot.DefaultFont.Variant = "Sans"
	panels := [][]*plot.Plot{
		{r.bars("bulk-tcp", "Bulk over TCP, MiB/s", speed, 1./mib), r.bars("bulk-tcp", "Bulk over TCP, CPU seconds per GiB", cpuEach, gib)},
		{r.bars("bulk-tls", "Bulk over TLS, MiB/s", speed, 1./mib), r.bars("bulk-tls", "Bulk over TLS, CPU seconds per GiB", cpuEach, gib)},
		{r.bars("unary-64-callers", "64 callers on one client, calls/s", speed, 1), r.bars("unary", "One caller, µs until the reply (p50)", p50, 1e6)},
		{r.lines("streams-", "streams at once", "CPU seconds per GiB", streamSteps, cpuEach, gib), r.lines("clients-", "clients", "CPU µs per call", clientSteps, cpuEach, 1e6)},
	}
	canvas := vgsvg.New(26*vg.Centimeter, 28*vg.Centimeter)
	tiles := draw.Tiles{Rows: len(panels), Cols: 2, PadX: 6 * vg.Millimeter, PadY: 6 * vg.Millimeter,
		PadTop: 2 * vg.Millimeter, PadBottom: 2 * vg.Millimeter, PadLeft: 2 * vg.Millimeter, PadRight: 4 * vg.Millimeter}
	canvas.SetColor(color.White) // also behind the gaps, for pages that are dark
	canvas.Fill(draw.New(canvas).Rectangle.Path())
	for i, row := range plot.Align(panels, tiles, draw.New(canvas)) {
		for j, tile := range row {
			panels[i][j].Draw(tile)
		}
	}
	f := must(os.Create(file))
	must(canvas.WriteTo(f))
	check(f.Close())
}

// isOurs tells whose result it is.
func isOurs(name string) bool { return strings.HasPrefix(name, "rpc") }

// bars shows a metric of a scenario, a bar for each contestant, the first at the top.
func (r *report) bars(scenario, title string, m metric, unit float64) *plot.Plot {
	p := plot.New()
	p.Title.Text = title
	p.Title.Padding = 2 * vg.Millimeter
	p.X.Min = 0
	p.HideY()
	var names []string
	var ours, others plotter.Values
	var labels plotter.XYLabels
	results := slices.Clone(r.results[scenario])
	slices.Reverse(results)
	for i, res := range results {
		value := res.median(m) * unit
		names = append(names, res.name)
		labels.XYs = append(labels.XYs, plotter.XY{X: value, Y: float64(i)})
		labels.Labels = append(labels.Labels, " "+number(value))
		p.X.Max = max(p.X.Max, value*1.15) // room for the label
		if isOurs(res.name) {
			ours, others = append(ours, value), append(others, 0)
		} else {
			ours, others = append(ours, 0), append(others, value)
		}
	}
	for _, b := range []struct {
		values plotter.Values
		color.Color
	}{{ours, oursColor}, {others, otherColor}} {
		chart := must(plotter.NewBarChart(b.values, 4*vg.Millimeter))
		chart.Horizontal, chart.Color, chart.LineStyle.Width = true, b.Color, 0
		p.Add(chart)
	}
	text := must(plotter.NewLabels(labels))
	for i := range text.TextStyle {
		text.TextStyle[i].YAlign = draw.YCenter
	}
	p.Add(text)
	p.NominalY(names...)
	return p
}

// lines shows how a metric grows with the steps.
func (r *report) lines(prefix, what, title string, steps []int, m metric, unit float64) *plot.Plot {
	p := plot.New()
	p.Title.Text = title + ", by " + what
	p.Y.Min = 0
	p.Legend.Top, p.Legend.Left, p.Legend.Padding = true, true, vg.Millimeter
	p.Title.Padding = 2 * vg.Millimeter
	var ticks []plot.Tick
	for i, n := range steps {
		ticks = append(ticks, plot.Tick{Value: float64(i), Label: fmt.Sprint(n)})
	}
	p.X.Tick.Marker = plot.ConstantTicks(ticks)
	for k := range r.results[prefix+fmt.Sprint(steps[0])] {
		var points plotter.XYs
		name := ""
		for i, n := range steps {
			res := r.results[prefix+fmt.Sprint(n)][k]
			name, _, _ = strings.Cut(res.name, ",")
			points = append(points, plotter.XY{X: float64(i), Y: res.median(m) * unit})
			p.Y.Max = max(p.Y.Max, points[i].Y*1.6) // room for the legend
		}
		line, dots, err := plotter.NewLinePoints(points)
		check(err)
		line.Color, line.Width, line.Dashes = otherColor, vg.Points(1.5), dashes[k%len(dashes)]
		if isOurs(name) {
			line.Color = oursColor
		}
		dots.Color, dots.Shape = line.Color, draw.CircleGlyph{}
		p.Add(line, dots)
		p.Legend.Add(name, line, dots)
	}
	return p
}

// dashes tell lines of one colour apart.
var dashes = [][]vg.Length{nil, {vg.Points(6), vg.Points(2)}, {vg.Points(2), vg.Points(2)}, {vg.Points(8), vg.Points(2), vg.Points(2), vg.Points(2)}, {vg.Points(1), vg.Points(3)}}
