// A 2 x 1.2 plate with a notch cut out of its top right corner, two holes and a steel insert.
//
//   gmsh -2 -format msh22 -setnumber size 0.048 plate.geo -o plate.msh
//   gmsh -2 -format msh22 -setnumber size 0.024 plate.geo -o plate_fine.msh
//
// Lengths are in units of 10 cm. Tags (problems/plate.py names them):
//   surfaces  1 aluminium, 2 steel insert
//   curves   11 outer edge (convection), 12 left edge (cooled), 13 hole 1 (convection), 14 hole 2 (insulated)

DefineConstant[ size = 0.048 ];

Mesh.MshFileVersion = 2.2;
Mesh.Binary = 0;
Mesh.Algorithm = 6;                    // frontal Delaunay: near-equilateral triangles
Mesh.MeshSizeExtendFromBoundary = 1;

// The solution has a singularity at the re-entrant corner, and the holes are small: both get smaller cells.
near = 0.5 * size;

// ---- outer edge, counter-clockwise from the origin; point 4 is the re-entrant corner
Point(1) = {0.0, 0.0, 0, size};
Point(2) = {2.0, 0.0, 0, size};
Point(3) = {2.0, 0.8, 0, size};
Point(4) = {1.4, 0.8, 0, near};
Point(5) = {1.4, 1.2, 0, size};
Point(6) = {0.0, 1.2, 0, size};
Line(1) = {1, 2};
Line(2) = {2, 3};
Line(3) = {3, 4};
Line(4) = {4, 5};
Line(5) = {5, 6};
Line(6) = {6, 1};
Curve Loop(1) = {1, 2, 3, 4, 5, 6};

// ---- the insert: conforming, as its edges bound both surfaces
Point(11) = {0.8, 0.25, 0, size};
Point(12) = {1.1, 0.25, 0, size};
Point(13) = {1.1, 0.95, 0, size};
Point(14) = {0.8, 0.95, 0, size};
Line(11) = {11, 12};
Line(12) = {12, 13};
Line(13) = {13, 14};
Line(14) = {14, 11};
Curve Loop(2) = {11, 12, 13, 14};

// ---- holes: four arcs each, as an arc has to be shorter than a half circle
Macro CutCircle
  p = newp;
  Point(p) = {cx, cy, 0, near};
  Point(p + 1) = {cx + r, cy, 0, near};
  Point(p + 2) = {cx, cy + r, 0, near};
  Point(p + 3) = {cx - r, cy, 0, near};
  Point(p + 4) = {cx, cy - r, 0, near};
  c = newc;
  Circle(c) = {p + 1, p, p + 2};
  Circle(c + 1) = {p + 2, p, p + 3};
  Circle(c + 2) = {p + 3, p, p + 4};
  Circle(c + 3) = {p + 4, p, p + 1};
  arcs[] = {c, c + 1, c + 2, c + 3};
Return

cx = 0.45; cy = 0.80; r = 0.16;
Call CutCircle;
hole_1[] = arcs[];
Curve Loop(3) = {hole_1[]};

cx = 1.50; cy = 0.40; r = 0.14;
Call CutCircle;
hole_2[] = arcs[];
Curve Loop(4) = {hole_2[]};

Plane Surface(1) = {1, 2, 3, 4};
Plane Surface(2) = {2};

Physical Surface("aluminium", 1) = {1};
Physical Surface("steel insert", 2) = {2};
Physical Curve("outer edge", 11) = {1, 2, 3, 4, 5};
Physical Curve("cooled edge", 12) = {6};
Physical Curve("hole 1", 13) = {hole_1[]};
Physical Curve("hole 2", 14) = {hole_2[]};
