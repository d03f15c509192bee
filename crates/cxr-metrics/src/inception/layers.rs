//! The convolutions of the network: names as pytorch-fid and torch-fidelity have them, and their sizes.

/// One convolution, followed by batch normalization (epsilon 1e-3) and ReLU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Name of its module, e.g. `Mixed_5b.branch1x1`.
    pub name: String,
    /// Channels that it takes.
    pub input: usize,
    /// Channels that it gives.
    pub output: usize,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Step in both directions.
    pub stride: usize,
    /// Zeros above and below, left and right.
    pub padding: [usize; 2],
}

/// Number of features.
pub const FEATURES: usize = 2048;
/// Number of logits.
pub const CLASSES: usize = 1008;

/// All 94 convolutions, in the order of the network.
pub fn layers() -> Vec<Layer> {
    let mut list = List(Vec::new());
    list.square("Conv2d_1a_3x3", 3, 32, 3, 2, 0);
    list.square("Conv2d_2a_3x3", 32, 32, 3, 1, 0);
    list.square("Conv2d_2b_3x3", 32, 64, 3, 1, 1);
    list.square("Conv2d_3b_1x1", 64, 80, 1, 1, 0);
    list.square("Conv2d_4a_3x3", 80, 192, 3, 1, 0);
    for (name, input, pool) in [("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)] {
        list.block_a(name, input, pool);
    }
    list.block_b("Mixed_6a", 288);
    for (name, inner) in [("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)] {
        list.block_c(name, 768, inner);
    }
    list.block_d("Mixed_7a", 768);
    list.block_e("Mixed_7b", 1280);
    list.block_e("Mixed_7c", 2048);
    list.0
}

struct List(Vec<Layer>);

impl List {
    fn add(
        &mut self,
        name: String,
        [input, output]: [usize; 2],
        kernel: [usize; 2],
        stride: usize,
        padding: [usize; 2],
    ) {
        self.0.push(Layer { name, input, output, kernel, stride, padding });
    }

    fn square(
        &mut self,
        name: &str,
        input: usize,
        output: usize,
        side: usize,
        stride: usize,
        padding: usize,
    ) {
        self.add(name.into(), [input, output], [side, side], stride, [padding, padding]);
    }

    /// A branch of a block: convolutions one after another, each of stride 1 that keeps the size.
    fn branch(&mut self, block: &str, input: usize, steps: &[(&str, usize, [usize; 2])]) {
        let mut before = input;
        for (name, output, kernel) in steps {
            let padding = [kernel[0] / 2, kernel[1] / 2];
            self.add(format!("{block}.{name}"), [before, *output], *kernel, 1, padding);
            before = *output;
        }
    }

    fn block_a(&mut self, block: &str, input: usize, pool: usize) {
        self.branch(block, input, &[("branch1x1", 64, [1, 1])]);
        self.branch(block, input, &[("branch5x5_1", 48, [1, 1]), ("branch5x5_2", 64, [5, 5])]);
        self.branch(
            block,
            input,
            &[("branch3x3dbl_1", 64, [1, 1]), ("branch3x3dbl_2", 96, [3, 3]), ("branch3x3dbl_3", 96, [3, 3])],
        );
        self.branch(block, input, &[("branch_pool", pool, [1, 1])]);
    }

    fn block_b(&mut self, block: &str, input: usize) {
        self.square(&format!("{block}.branch3x3"), input, 384, 3, 2, 0);
        self.branch(block, input, &[("branch3x3dbl_1", 64, [1, 1]), ("branch3x3dbl_2", 96, [3, 3])]);
        self.square(&format!("{block}.branch3x3dbl_3"), 96, 96, 3, 2, 0);
    }

    fn block_c(&mut self, block: &str, input: usize, inner: usize) {
        self.branch(block, input, &[("branch1x1", 192, [1, 1])]);
        self.branch(
            block,
            input,
            &[("branch7x7_1", inner, [1, 1]), ("branch7x7_2", inner, [1, 7]), ("branch7x7_3", 192, [7, 1])],
        );
        self.branch(
            block,
            input,
            &[
                ("branch7x7dbl_1", inner, [1, 1]),
                ("branch7x7dbl_2", inner, [7, 1]),
                ("branch7x7dbl_3", inner, [1, 7]),
                ("branch7x7dbl_4", inner, [7, 1]),
                ("branch7x7dbl_5", 192, [1, 7]),
            ],
        );
        self.branch(block, input, &[("branch_pool", 192, [1, 1])]);
    }

    fn block_d(&mut self, block: &str, input: usize) {
        self.branch(block, input, &[("branch3x3_1", 192, [1, 1])]);
        self.square(&format!("{block}.branch3x3_2"), 192, 320, 3, 2, 0);
        self.branch(
            block,
            input,
            &[("branch7x7x3_1", 192, [1, 1]), ("branch7x7x3_2", 192, [1, 7]), ("branch7x7x3_3", 192, [7, 1])],
        );
        self.square(&format!("{block}.branch7x7x3_4"), 192, 192, 3, 2, 0);
    }

    fn block_e(&mut self, block: &str, input: usize) {
        self.branch(block, input, &[("branch1x1", 320, [1, 1])]);
        self.branch(block, input, &[("branch3x3_1", 384, [1, 1])]);
        self.branch(block, 384, &[("branch3x3_2a", 384, [1, 3])]);
        self.branch(block, 384, &[("branch3x3_2b", 384, [3, 1])]);
        self.branch(block, input, &[("branch3x3dbl_1", 448, [1, 1]), ("branch3x3dbl_2", 384, [3, 3])]);
        self.branch(block, 384, &[("branch3x3dbl_3a", 384, [1, 3])]);
        self.branch(block, 384, &[("branch3x3dbl_3b", 384, [3, 1])]);
        self.branch(block, input, &[("branch_pool", 192, [1, 1])]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_parameters_as_in_the_published_file() {
        let layers = layers();
        assert_eq!(layers.len(), 94);
        let weights: usize = layers.iter().map(|l| l.input * l.output * l.kernel[0] * l.kernel[1]).sum();
        let norms: usize = layers.iter().map(|l| 4 * l.output).sum();
        // pytorch-fid's file without `fc`: 21,820,000 numbers.
        assert_eq!(weights + norms, 21_820_000);
    }

    #[test]
    fn names_are_there_once_and_only_the_reductions_shrink() {
        let layers = layers();
        let names: std::collections::BTreeSet<&str> = layers.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names.len(), layers.len());
        let strided: Vec<&str> = layers.iter().filter(|l| l.stride == 2).map(|l| l.name.as_str()).collect();
        assert_eq!(
            strided,
            [
                "Conv2d_1a_3x3",
                "Mixed_6a.branch3x3",
                "Mixed_6a.branch3x3dbl_3",
                "Mixed_7a.branch3x3_2",
                "Mixed_7a.branch7x7x3_4"
            ]
        );
    }
}
